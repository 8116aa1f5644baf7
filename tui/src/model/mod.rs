//! What the console knows of a node: readings become intervals, and those a history.
//!
//! [`interval`] is the only place where two readings become rates, and [`history`] the only one
//! that keeps them. Nothing here knows of terminals, sockets or clocks.

pub mod activity;
pub mod history;
pub mod interval;

use weft_api::Connection;
use weft_api::Event;
use weft_api::NodeStatus;
use weft_api::Stats;
use weft_api::Volume;

use serde::Deserialize;
use serde::Serialize;

/// One reading of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// All counters.
    pub stats: Stats,
    /// Connections at about the same time.
    pub connections: Vec<Connection>,
    /// What happened since the sample before, oldest first.
    #[serde(default)]
    pub events: Vec<Event>,
    /// How volumes are set up, which changes seldom: absent if they were not asked for this time.
    #[serde(default)]
    pub volumes: Option<Vec<Volume>>,
    /// The node itself: absent if it was not asked for this time.
    #[serde(default)]
    pub node: Option<NodeStatus>,
}
