"""An adapter on its way from its file to a slot."""
