//! What a store promises, tested the same way on every medium that needs no network.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use cluster::secret::ClusterSecret;
use cluster::{Cluster, Dialer, NodeId, Peers};
use opendal::{Operator, services};
use pgerror::PgError;
use serde_json::json;
use tempfile::TempDir;
use uuid::Uuid;

use crate::files::{Collection, Remote};
use crate::object::Bucketed;
use crate::trouble::Place;
use crate::{Created, Entry, FILES, Files, Store, Stores, Uri, is_transient, s3};

/// A node with the number 1 that offers its files to itself, and its directories.
struct Ground {
    peers: Peers,
    external: TempDir,
    _state: TempDir,
}

fn ground() -> Ground {
    let (external, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let me = json!({
        "instance": Uuid::new_v4(), "node_id": 1, "cluster_id": null, "address": "127.0.0.1:1", "locality": "",
        "shard": "main", "build": "", "started_at": "2026-01-01T00:00:00Z", "server": null, "peers": [], "shards": {},
        "revision": 0,
    });
    let store = Arc::new(cluster::store::Store::open(state.path()).unwrap());
    let cluster = Cluster::new(serde_json::from_value(me).unwrap(), &[], store).unwrap();
    let peers = Peers::new(cluster, Dialer::new(ClusterSecret::Insecure, None, "test".to_owned()));
    let stores = Stores::new(peers.clone(), external.path().to_owned());
    peers.offer(FILES, Arc::new(Files::new(external.path(), stores)));
    Ground { peers, external, _state: state }
}

impl Ground {
    async fn open(&self, uri: &str) -> Store {
        let stores = Stores::new(self.peers.clone(), self.external.path().to_owned());
        stores.open(&Uri::parse(uri).unwrap()).await.unwrap()
    }

    /// The same directory by itself, by way of the peers, and an object store in memory.
    async fn stores(&self) -> Vec<Store> {
        let place = Place::plain("nodelocal://1/remote");
        let of = Collection::Own("remote".to_owned());
        let remote = Remote::new(self.peers.clone(), NodeId(1), of, place.clone());
        let memory = s3::guarded(Operator::new(services::Memory::default()).unwrap());
        vec![
            self.open("nodelocal://self/own").await,
            Store::over(remote, place),
            Store::over(Bucketed::new(memory, Place::plain("memory")), Place::plain("memory")),
        ]
    }
}

/// All files below a directory, the unfinished ones, too.
fn files_below(directory: &Path) -> usize {
    let entries = std::fs::read_dir(directory).unwrap().flatten();
    entries.map(|entry| if entry.path().is_dir() { files_below(&entry.path()) } else { 1 }).sum()
}

#[tokio::test]
async fn a_name_is_created_once_and_trying_again_is_no_loss() {
    let ground = ground();
    for store in ground.stores().await {
        let (ours, theirs) = (Bytes::from_static(b"ours"), Bytes::from_static(b"theirs"));
        assert_eq!(store.create("a/lock", ours.clone()).await.unwrap(), Created::New, "{store:?}");
        assert_eq!(store.create("a/lock", ours.clone()).await.unwrap(), Created::New, "{store:?}");
        assert_eq!(store.create("a/lock", theirs).await.unwrap(), Created::Exists(ours.clone()), "{store:?}");
        assert_eq!(store.read("a/lock").await.unwrap(), Some(ours), "{store:?}");
        assert_eq!(store.create("empty", Bytes::new()).await.unwrap(), Created::New, "{store:?}");
        assert_eq!(store.read("empty").await.unwrap(), Some(Bytes::new()), "{store:?}");
        assert_eq!(store.read("a").await.ok().flatten(), None, "{store:?}");
        assert_eq!(store.read("a/lock/below").await.unwrap(), None, "{store:?}");
        assert!(store.is_write_once().await.unwrap(), "{store:?}");
    }
    assert_eq!(files_below(ground.external.path()), 4);
}

#[tokio::test]
async fn of_many_who_create_one_name_one_wins() {
    let ground = ground();
    for store in ground.stores().await {
        let tries = (0..16_u8).map(|who| {
            let store = store.clone();
            tokio::spawn(async move { store.create("lock", Bytes::from(vec![who; 100_000])).await.unwrap() })
        });
        let outcomes = futures_util::future::join_all(tries).await;
        let won = outcomes.into_iter().filter(|outcome| *outcome.as_ref().unwrap() == Created::New);
        assert_eq!(won.count(), 1, "{store:?}");
    }
}

#[tokio::test]
async fn a_file_appears_whole_or_not_at_all() {
    let ground = ground();
    let piece = Bytes::from(vec![7; 3 * 1024 * 1024]);
    for store in ground.stores().await {
        let mut writer = store.writer("data/1").await.unwrap();
        for _ in 0..4 {
            writer.write(piece.clone()).await.unwrap();
        }
        assert_eq!(store.list("").await.unwrap(), [], "{store:?}");
        assert_eq!(store.read("data/1").await.unwrap(), None, "{store:?}");
        writer.finish().await.unwrap();
        let entries = [Entry { path: "data/1".to_owned(), size: 4 * piece.len() as u64 }];
        assert_eq!(store.list("").await.unwrap(), entries, "{store:?}");
        assert_eq!(store.read("data/1").await.unwrap().unwrap().len(), 4 * piece.len(), "{store:?}");

        let mut dropped = store.writer("data/2").await.unwrap();
        dropped.write(piece.clone()).await.unwrap();
        drop(dropped);
        assert_eq!(store.list("").await.unwrap(), entries, "{store:?}");
        store.delete("data/1").await.unwrap();
        store.delete("data/1").await.unwrap();
        assert_eq!(store.list("").await.unwrap(), [], "{store:?}");
    }
    assert_eq!(files_below(ground.external.path()), 0);
}

#[tokio::test]
async fn listing_goes_by_the_beginning_of_the_path() {
    let ground = ground();
    for store in ground.stores().await {
        for path in ["b/2/x", "a", "b/1", "b/10", "c/1"] {
            store.create(path, Bytes::from_static(b".")).await.unwrap();
        }
        for (prefix, expected) in [
            ("", ["a", "b/1", "b/10", "b/2/x", "c/1"].as_slice()),
            ("b/", &["b/1", "b/10", "b/2/x"]),
            ("b/1", &["b/1", "b/10"]),
            ("b/2/", &["b/2/x"]),
            ("b/2/x", &["b/2/x"]),
            ("d/", &[]),
            ("a/", &[]),
        ] {
            let entries = store.list(prefix).await.unwrap();
            let paths: Vec<&str> = entries.iter().map(|entry| entry.path.as_str()).collect();
            assert_eq!(paths, expected, "{prefix} in {store:?}");
        }
    }
}

#[tokio::test]
async fn nothing_outside_of_the_collection_is_touched() {
    let ground = ground();
    let secret = ground.external.path().join("secret");
    std::fs::write(&secret, "s").unwrap();
    for store in ground.stores().await {
        for path in ["../secret", "a/../../secret", ".."] {
            let error = store.read(path).await.unwrap_err();
            let said = PgError::of(&error).unwrap();
            let message = format!("local file access to paths outside of external-io-dir is not allowed: {path}");
            assert_eq!((said.code.as_str(), &said.message), ("42501", &message));
            assert!(store.delete(path).await.is_err() && store.writer(path).await.is_err());
            assert!(store.create(path, Bytes::new()).await.is_err() && store.list(path).await.is_err());
        }
        assert_eq!(store.read("/secret").await.unwrap(), None);
    }
    // What a peer asks for is checked by the node whose files they are.
    for (root, path) in [("..", "x"), ("a", "../../x"), ("/../etc", "passwd")] {
        let request = json!({"at": "", "root": root, "path": path, "action": "read"});
        assert!(ground.peers.serve(FILES, request).await.is_err());
    }
    assert!(ground.open("nodelocal://1/").await.writer(".part/x").await.is_err());
    assert!(secret.exists());
}

#[tokio::test]
async fn a_store_tells_who_holds_it_and_what_is_wrong() {
    let ground = ground();
    assert_eq!(ground.open("nodelocal://self/a").await.node(), Some(NodeId(1)));
    ground.open("nodelocal://1/a").await.probe().await.unwrap();
    let elsewhere = ground.open("nodelocal://7/a").await;
    assert_eq!(elsewhere.node(), Some(NodeId(7)));
    let error = elsewhere.probe().await.unwrap_err();
    assert_eq!(PgError::of(&error).unwrap().message, "the store at nodelocal://7/a cannot be reached");
    assert!(is_transient(&error));

    let unresolved = Stores::new(ground.peers.clone(), ground.external.path().to_owned());
    let error = unresolved.open(&Uri::parse("external://west").unwrap()).await.unwrap_err();
    assert_eq!(PgError::of(&error).unwrap().code.as_str(), "42704");

    // A file where the collection should be.
    std::fs::write(ground.external.path().join("file"), "").unwrap();
    let error = ground.open("nodelocal://1/file").await.probe().await.unwrap_err();
    assert!(!is_transient(&error), "{error:?}");
}

#[tokio::test]
async fn a_store_that_does_not_listen_is_said_to_be_out_of_reach() {
    transport();
    let ground = ground();
    let keys = "AWS_ACCESS_KEY_ID=k&AWS_SECRET_ACCESS_KEY=hunter2";
    let store = ground.open(&format!("s3://b/p?{keys}&AWS_ENDPOINT=http://127.0.0.1:1")).await;
    let error = store.read("x").await.unwrap_err();
    let said = PgError::of(&error).unwrap();
    assert_eq!(said.code.as_str(), "58030", "{error:?}");
    assert!(said.message.ends_with("cannot be reached from node 1"), "{said:?}");
    assert!(is_transient(&error) && !format!("{error:?}{said:?}{store:?}").contains("hunter2"));
}

/// As the binary does at its start.
fn transport() {
    // Another test may have been first.
    drop(rustls::crypto::ring::default_provider().install_default());
    crate::install();
    crate::install();
}
