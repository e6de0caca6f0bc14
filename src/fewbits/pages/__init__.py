"""Pages for browsers: their content as values, their look in files, and how they become one HTML file."""
