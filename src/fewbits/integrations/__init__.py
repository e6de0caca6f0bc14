"""Front doors for the models of other frameworks, which are imported only when they are used."""
