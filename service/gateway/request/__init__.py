"""Reading a request: parsing, validation and bounds."""
