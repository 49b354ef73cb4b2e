//! Catalyst's types on the wire, shared by daemon and CLI.
