//! Files in an object store.
//!
//! An object appears when its upload is completed and not before. Uploads that are longer than one part go in parts,
//! two at a time; a writer that is dropped has its parts removed, as far as the store still answers.

use anyhow::Context as _;
use bytes::Bytes;
use cluster::service::{Boxed, ByteStream, Upload};
use futures_util::StreamExt as _;
use opendal::{ErrorKind, Operator};
use tokio::runtime::Handle;

use crate::store::{Entry, LIST_MAX, Medium, too_many};
use crate::trouble::Place;

/// The length of an upload's parts. Stores take 10,000 of them: a file of more than 80 GB is refused by the store.
const PART: usize = 8 * 1024 * 1024;

/// Parts of one upload that are under way at once. A writer so holds up to 24 MiB.
const PARTS_AT_ONCE: usize = 2;

/// A collection in a bucket.
#[derive(Clone)]
pub(crate) struct Bucketed {
    operator: Operator,
    place: Place,
}

impl Bucketed {
    /// The collection at the operator's root. The operator brings deadlines and retries.
    pub(crate) fn new(operator: Operator, place: Place) -> Self {
        Self { operator, place }
    }

    fn told<T>(&self, outcome: opendal::Result<T>) -> anyhow::Result<T> {
        outcome.map_err(|error| self.place.of_store(&error))
    }
}

impl Medium for Bucketed {
    fn upload(&self, path: String, once: bool) -> Boxed<'_, Box<dyn Upload>> {
        Box::pin(async move {
            let writing = self.operator.writer_with(&path).chunk(PART).concurrent(PARTS_AT_ONCE).if_not_exists(once);
            let writer = Some(self.told(writing.await)?);
            Ok(Box::new(Sending { bucketed: self.clone(), writer, path, once, sent: 0 }) as Box<dyn Upload>)
        })
    }

    fn download(&self, path: String) -> Boxed<'_, Option<ByteStream>> {
        Box::pin(async move {
            let opening = async { self.operator.reader(&path).await?.into_bytes_stream(..).await };
            let mut stream = match opening.await {
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
                opened => self.told(opened)?.boxed(),
            };
            // Nothing is asked of the store before the first piece.
            let first = match stream.next().await.transpose().map_err(store_error) {
                Err(Some(error)) if error.kind() == ErrorKind::NotFound => return Ok(None),
                Err(Some(error)) => return Err(self.place.of_store(&error)),
                Err(None) => return Err(self.place.unreachable("It broke off.")),
                Ok(first) => first,
            };
            let place = self.place.clone();
            let rest = stream.map(move |piece| {
                piece.map_err(|error| match store_error(error) {
                    Some(error) => place.of_store(&error),
                    None => place.unreachable("It broke off."),
                })
            });
            let first = futures_util::stream::iter(first.map(Ok));
            Ok(Some(first.chain(rest).boxed()))
        })
    }

    fn list(&self, prefix: String) -> Boxed<'_, Vec<Entry>> {
        Box::pin(async move {
            let mut lister = self.told(self.operator.lister_with(&prefix).recursive(true).await)?;
            let mut entries = Vec::new();
            while let Some(found) = lister.next().await {
                let found = match found {
                    Err(error) if error.kind() == ErrorKind::NotFound => break,
                    found => self.told(found)?,
                };
                if !found.metadata().is_file() {
                    continue;
                }
                if entries.len() == LIST_MAX {
                    return Err(too_many(&self.place).into());
                }
                entries.push(Entry { path: found.path().to_owned(), size: found.metadata().content_length() });
            }
            Ok(entries)
        })
    }

    fn delete(&self, path: String) -> Boxed<'_, ()> {
        Box::pin(async move {
            match self.operator.delete(&path).await {
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
                deleted => self.told(deleted),
            }
        })
    }
}

/// The library's error in a stream's.
fn store_error(error: std::io::Error) -> Option<opendal::Error> {
    error.into_inner()?.downcast().ok().map(|error| *error)
}

struct Sending {
    bucketed: Bucketed,
    /// Away once it is finished, or of no more use.
    writer: Option<opendal::Writer>,
    path: String,
    once: bool,
    sent: u64,
}

impl Sending {
    /// What a failed completion means. The answer to an earlier try may have been lost: then the upload is no longer
    /// known to the store, or its own object is in the way.
    async fn settle(&self, error: &opendal::Error) -> anyhow::Result<()> {
        let place = &self.bucketed.place;
        match error.kind() {
            ErrorKind::ConditionNotMatch | ErrorKind::AlreadyExists if self.once => {
                Err(place.exists(&self.path).into())
            }
            ErrorKind::NotFound | ErrorKind::Conflict => match self.bucketed.operator.stat(&self.path).await {
                Ok(_) if self.once => Err(place.exists(&self.path).into()),
                Ok(there) if there.content_length() == self.sent => Ok(()),
                _ => Err(place.of_store(error)),
            },
            _ => Err(place.of_store(error)),
        }
    }
}

impl Upload for Sending {
    fn write(&mut self, bytes: Bytes) -> Boxed<'_, ()> {
        Box::pin(async move {
            let writer = self.writer.as_mut().context("write to an object after it failed")?;
            self.sent += bytes.len() as u64;
            let written = writer.write(bytes).await;
            self.bucketed.told(written)
        })
    }

    fn finish(mut self: Box<Self>) -> Boxed<'static, ()> {
        Box::pin(async move {
            let writer = self.writer.as_mut().context("finish an object after it failed")?;
            match writer.close().await {
                Ok(_) => {
                    self.writer = None;
                    Ok(())
                }
                Err(error) => self.settle(&error).await,
            }
        })
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        let Some(mut writer) = self.writer.take() else { return };
        let Ok(runtime) = Handle::try_current() else { return };
        let at = self.bucketed.place.at.clone();
        runtime.spawn(async move {
            if let Err(error) = writer.abort().await {
                // The bucket's lifecycle rule has to remove it.
                tracing::debug!(kind = %error.kind(), "an unfinished upload to {at} could not be taken back");
            }
        });
    }
}
