//! Tests of the whole system: real servers, real nodes, real clients.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod clients; // every client takes every node for PostgreSQL: psql and its friends
mod demo; // what `backhaul demo` promises: its fleet, its ends, its refusals
mod drivers; // the same for application drivers
mod failover; // promotion, crash and return of servers and nodes
mod mistakes; // wrong secrets, shards, stores and addresses
mod security; // passwords, TLS, open doors
mod wire; // what SQL cannot see: frames, pipelines, transactions, cancel

#[path = "../support/mod.rs"]
mod support;
