"""`tightrope evaluate`: models beside what temperature makes of the plain one, and samples of them."""
