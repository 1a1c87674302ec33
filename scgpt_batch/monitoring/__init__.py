"""Is the endpoint healthy, did the batch job run, are its vectors sound?  SQL, rules over it, a page."""
