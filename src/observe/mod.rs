//! What the node tells about itself besides its API: the log.

pub mod log;
