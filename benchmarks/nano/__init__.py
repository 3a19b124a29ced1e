"""The recipe of the model that ships."""
