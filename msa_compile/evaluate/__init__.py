"""Dense against sparse on the user's data: by position, on probes of retrieval, and the budget that will do."""
