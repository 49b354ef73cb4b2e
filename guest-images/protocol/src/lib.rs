//! Frames and messages between host and guest agent.
