//! What the node tells about itself: the log, and what it counts.
//!
//! | file | owns |
//! |---|---|
//! | [`history`] | what was counted, second by second |
//! | [`log`], [`log_file`] | lines for people and machines |
//! | [`event`] | what happened that an operator should know |
//! | [`histogram`], [`requests`] | latencies and counts of each volume |
//! | [`stages`] | where the time of a request goes |
//! | [`task`] | long work: how far it is |

pub mod event;
pub mod histogram;
pub mod history;
pub mod log;
pub mod log_file;
pub mod requests;
pub mod stages;
pub mod task;
