"""Change the policy of a running job: what is asked, how the ranks agree, and what was in force when."""
