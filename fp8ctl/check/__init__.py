"""What a live server really serves: levels that each include the one before, one verdict."""
