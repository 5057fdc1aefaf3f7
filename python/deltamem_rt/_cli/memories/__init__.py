"""The commands that work on the memories in a store: a module for each, and what they share.

`place` opens the store, `shown` says how a commit looks to a person, `forms` to a program, `graph` draws who came from whom.
"""
