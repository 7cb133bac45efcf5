"""ASIDE: what is learnt off the loop, from data that already lies there: replays, fits, trained routers."""
