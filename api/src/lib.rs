//! Types of Weft's management API and a small client; no server, no terminal.
#![forbid(unsafe_code)]
