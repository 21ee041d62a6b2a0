"""Generated documentation: pages and tables of docs/, README.md and params/README.md."""
