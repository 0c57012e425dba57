//! Tests of the whole system: real servers, real nodes, real clients.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod altered; // tables that keep being altered: held on the leaseholder, or the job fails and names them
mod any_moment; // any one process is killed at any moment of a backup and of a restore
mod backup; // what BACKUP promises: where it runs, what clients are told, what is in it
mod backup_faults; // deaths in the middle, stores that fail, statements that cannot be
mod check; // what `backhaul check` finds, and that its statements mend it
mod clients; // every client takes every node for PostgreSQL: psql and its friends
mod closed_network; // regions that only nodes can speak across, and a store that one of them reaches
mod cluster; // whole clusters: every database is in the backup or named, and all come back or none
mod conflicts; // VACUUM on the primary while a standby is read
mod control; // PAUSE, RESUME, CANCEL, and what a client that waits is told
mod crash; // whatever dies, wherever a job is: it ends right, once, and leaves nothing
mod demo; // what `backhaul demo` promises: its fleet, its ends, its refusals
mod driver_steps; // one script of steps through every driver, and through psql
mod drivers; // the same for application drivers
mod extended; // ours in the extended protocol: what a driver may rely on, promise by promise
mod failover; // promotion, crash and return of servers and nodes
mod hostile; // operators, functions and types of a client's own that stand before PostgreSQL's
mod locality; // CockroachDB's cases of EXECUTION LOCALITY: nodes whose tiers cross, several shards
mod mistakes; // wrong secrets, shards, stores and addresses
mod outages; // stores, nodes and registries that are away for long: waited for, told, and nothing made twice
mod plan; // EXPLAIN BACKUP tells what is done; options, ranges and regions; docs/locality.md
mod restore; // everything comes back the same, once, and damage is noticed
mod rows; // SHOW as a row source: prepared, in pipelines, with positions, cancelled
mod scripts; // texts of several statements, ours among PostgreSQL's
mod security; // passwords, TLS, open doors
mod sessions; // timeouts, encoding, dates and messages that a client has set for its session
mod settings; // what is set for the fleet holds on every node, without a restart
mod shards; // several shards: each by its own rules, into others by shard_map, and left out only by name
mod survival; // jobs outlive nodes that are stopped in turn, and a registry that moves
mod together; // several replicas at one point, and what becomes of it when one is lost
mod transactions; // a detached backup commits with its client's transaction, and otherwise never was
mod turnover; // nodes and servers that come, go and freeze while a backup runs
mod wire; // what SQL cannot see: frames, pipelines, transactions, cancel

#[path = "../support/mod.rs"]
mod support;
