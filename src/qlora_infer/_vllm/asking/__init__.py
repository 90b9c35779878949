"""Requests and answers in the forms that users have: chats, sampling parameters, parsed answers."""
