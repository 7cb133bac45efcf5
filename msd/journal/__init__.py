"""ASIDE: the queue's storage. `memory` is lost with the process; Welcome and Ack say so (`durable: false`)."""
