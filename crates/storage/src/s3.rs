//! S3 and what speaks like it: the parameters of its URIs, and the operator they become.
//!
//! With `AUTH=specified` (the default) a URI's own keys are used and nothing else: neither the node's environment nor
//! its instance's role is ever asked, or whoever may name a bucket could read with rights that are not theirs.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use opendal::layers::{RetryEvent, RetryLayer, TimeoutLayer};
use opendal::{Operator, services};
use pgerror::PgError;
use tokio::time::error::Elapsed;
use tokio::time::timeout;
use url::{Url, form_urlencoded};

use crate::trouble::Place;
use crate::uri::{invalid, unknown};
use crate::{FIRST_DELAY, REQUEST_DEADLINE, TRIES};

const ACCESS_KEY_ID: &str = "AWS_ACCESS_KEY_ID";
const SECRET_ACCESS_KEY: &str = "AWS_SECRET_ACCESS_KEY";
const SESSION_TOKEN: &str = "AWS_SESSION_TOKEN";
const REGION: &str = "AWS_REGION";
const ENDPOINT: &str = "AWS_ENDPOINT";
const USE_PATH_STYLE: &str = "AWS_USE_PATH_STYLE";
const AUTH: &str = "AUTH";

/// All parameters that an S3 URI may have; another one is refused.
const PARAMETERS: [&str; 7] = [ACCESS_KEY_ID, SECRET_ACCESS_KEY, SESSION_TOKEN, REGION, ENDPOINT, USE_PATH_STYLE, AUTH];

/// Parameters whose values are never shown.
const SECRETS: [&str; 2] = [SECRET_ACCESS_KEY, SESSION_TOKEN];

/// The region of stores that do not have any; and Amazon's, when it does not say another one.
const DEFAULT_REGION: &str = "us-east-1";

/// An alias of the first region that names any bucket's region when asked.
const REGION_ORACLE: &str = "https://s3-external-1.amazonaws.com";

/// Without an answer by then the store is unreachable: a guess would be refused by the bucket in words that no other
/// try would mend.
const REGION_DEADLINE: Duration = Duration::from_secs(10);

/// Buckets whose regions are remembered; with one more all are forgotten.
const REGIONS_MAX: usize = 1024;

/// The regions that Amazon named. A bucket never moves.
#[derive(Default)]
pub(crate) struct Regions(Mutex<BTreeMap<String, String>>);

impl Regions {
    fn get(&self, bucket: &str) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(bucket).cloned()
    }

    fn keep(&self, bucket: &str, region: &str) {
        let mut regions = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if regions.len() >= REGIONS_MAX {
            regions.clear();
        }
        regions.insert(bucket.to_owned(), region.to_owned());
    }
}

/// A bucket, a path in it, and how to get there.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Bucket {
    pub(crate) name: String,
    pub(crate) path: String,
    parameters: BTreeMap<&'static str, String>,
}

impl Bucket {
    pub(crate) fn parse(host: &str, path: &str, query: form_urlencoded::Parse<'_>) -> Result<Self, PgError> {
        let mut parameters = BTreeMap::new();
        let mut strangers = Vec::new();
        for (name, value) in query {
            match PARAMETERS.iter().find(|known| **known == name) {
                None => strangers.push(name.into_owned()),
                Some(known) => {
                    // Keys are base64 and have no space: it was a plus sign that somebody forgot to escape.
                    let value = if SECRETS.contains(known) { value.replace(' ', "+") } else { value.into_owned() };
                    if parameters.insert(*known, value).is_some() {
                        return Err(invalid(format!("s3 query parameter {known} is given more than once")));
                    }
                }
            }
        }
        unknown("s3", strangers)?;
        parameters.retain(|_, value| !value.is_empty());
        if host.is_empty() || host.contains(['@', ':', '\\']) {
            return Err(invalid("host component of s3 URI must be a bucket"));
        }
        let segments: Vec<&str> = path.split('/').filter(|segment| !segment.is_empty()).collect();
        let bucket = Self { name: host.to_owned(), path: segments.join("/"), parameters };
        bucket.check_segments()?;
        bucket.check_auth()?;
        bucket.path_style()?;
        bucket.check_endpoint()?;
        Ok(bucket)
    }

    /// HTTP libraries resolve dots as directories, which would lead out of the path and even out of the bucket.
    fn check_segments(&self) -> Result<(), PgError> {
        match self.path.split('/').find(|segment| matches!(*segment, "." | "..")) {
            Some(_) => Err(invalid("path component of s3 URI must not have segments \".\" or \"..\"")),
            None => Ok(()),
        }
    }

    fn check_auth(&self) -> Result<(), PgError> {
        match self.get(AUTH) {
            None | Some("specified") => {
                let missing = [ACCESS_KEY_ID, SECRET_ACCESS_KEY].into_iter().find(|name| self.get(name).is_none());
                match missing {
                    Some(name) => Err(invalid(format!("{AUTH} is set to 'specified', but {name} is not set"))),
                    None => Ok(()),
                }
            }
            Some("implicit") => {
                let given = [ACCESS_KEY_ID, SECRET_ACCESS_KEY, SESSION_TOKEN].into_iter();
                match given.into_iter().find(|name| self.get(name).is_some()) {
                    Some(name) => Err(invalid(format!("{AUTH} is set to 'implicit', but {name} is set"))),
                    None => Ok(()),
                }
            }
            Some(other) => Err(invalid(format!("unsupported value {other} for {AUTH}"))),
        }
    }

    fn check_endpoint(&self) -> Result<(), PgError> {
        let Some(endpoint) = self.get(ENDPOINT) else { return Ok(()) };
        let plain = Url::parse(endpoint).is_ok_and(|url| {
            matches!(url.scheme(), "http" | "https")
                && url.has_host()
                && url.username().is_empty()
                && url.password().is_none()
                && url.query().is_none()
                && url.fragment().is_none()
        });
        if plain {
            return Ok(());
        }
        Err(invalid(format!("{ENDPOINT} must be an http or https URL without user, query and fragment")))
    }

    /// Stores with an endpoint of their own rarely have a name per bucket, and a certificate does not match a bucket
    /// that has a dot.
    fn path_style(&self) -> Result<bool, PgError> {
        match self.get(USE_PATH_STYLE).map(str::to_ascii_lowercase).as_deref() {
            None => Ok(self.get(ENDPOINT).is_some() || self.name.contains('.')),
            Some("true" | "t" | "1") => Ok(true),
            Some("false" | "f" | "0") if self.name.contains('.') => {
                Err(invalid(format!("a bucket with a dot in its name needs {USE_PATH_STYLE}=true")))
            }
            Some("false" | "f" | "0") => Ok(false),
            Some(_) => Err(invalid(format!("{USE_PATH_STYLE} must be true or false"))),
        }
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.parameters.get(name).map(String::as_str)
    }

    /// Whether the node's own credentials are used.
    pub(crate) fn is_implicit(&self) -> bool {
        self.get(AUTH) == Some("implicit")
    }

    /// The parameters as a query, in the order of their names.
    pub(crate) fn query(&self, redacted: bool) -> String {
        let shown = self.parameters.iter().map(|(name, value)| match redacted && SECRETS.contains(name) {
            true => (*name, "redacted"),
            false => (*name, value.as_str()),
        });
        form_urlencoded::Serializer::new(String::new()).extend_pairs(shown).finish()
    }

    /// What must not stand in any text.
    pub(crate) fn secrets(&self) -> Vec<String> {
        SECRETS.iter().filter_map(|name| self.get(name).map(str::to_owned)).collect()
    }

    /// The operator, with deadlines and retries around every request.
    ///
    /// # Errors
    ///
    /// The parameters do not make a store, or Amazon does not say where the bucket is.
    pub(crate) async fn operator(&self, place: &Place, regions: &Regions) -> anyhow::Result<Operator> {
        self.check_segments()?;
        let mut s3 = services::S3::default().bucket(&self.name).root(&format!("/{}", self.path));
        if let Some(region) = self.region(place, regions).await? {
            s3 = s3.region(&region);
        }
        if let Some(endpoint) = self.get(ENDPOINT) {
            s3 = s3.endpoint(endpoint.trim_end_matches('/'));
        }
        if !self.path_style()? {
            s3 = s3.enable_virtual_host_style();
        }
        if !self.is_implicit() {
            s3 = s3.disable_config_load().disable_ec2_metadata();
        }
        if let (Some(id), Some(key)) = (self.get(ACCESS_KEY_ID), self.get(SECRET_ACCESS_KEY)) {
            s3 = s3.access_key_id(id).secret_access_key(key);
        }
        if let Some(token) = self.get(SESSION_TOKEN) {
            s3 = s3.session_token(token);
        }
        Operator::new(s3).map(guarded).map_err(|error| place.of_store(&error))
    }

    /// None leaves it to the environment of the node.
    async fn region(&self, place: &Place, regions: &Regions) -> anyhow::Result<Option<String>> {
        if let Some(region) = self.get(REGION) {
            return Ok(Some(region.to_owned()));
        }
        let in_environment = || ["AWS_REGION", "AWS_DEFAULT_REGION"].iter().any(|name| std::env::var(name).is_ok());
        if self.is_implicit() && in_environment() {
            return Ok(None);
        }
        if self.get(ENDPOINT).is_some() {
            return Ok(Some(DEFAULT_REGION.to_owned()));
        }
        let asked = timeout(REGION_DEADLINE, services::S3::detect_region(REGION_ORACLE, &self.name));
        self.told(place, regions, asked).await.map(Some)
    }

    /// The region as Amazon has named it, or names it now when `asked`.
    async fn told(
        &self,
        place: &Place,
        regions: &Regions,
        asked: impl Future<Output = Result<Option<String>, Elapsed>>,
    ) -> anyhow::Result<String> {
        if let Some(region) = regions.get(&self.name) {
            return Ok(region);
        }
        let told = asked.await.map_err(|_| {
            let seconds = REGION_DEADLINE.as_secs();
            place.unreachable(&format!("Amazon did not name the bucket's region within {seconds} seconds."))
        })?;
        let Some(region) = told else { return Ok(DEFAULT_REGION.to_owned()) };
        regions.keep(&self.name, &region);
        Ok(region)
    }
}

/// Puts a deadline on every request and tries again what may pass.
pub(crate) fn guarded(operator: Operator) -> Operator {
    let deadlines = TimeoutLayer::new().with_timeout(REQUEST_DEADLINE).with_io_timeout(REQUEST_DEADLINE);
    let retries = RetryLayer::new()
        .with_min_delay(FIRST_DELAY)
        .with_factor(2.0)
        .with_jitter()
        .with_max_times(TRIES - 1)
        // The error itself is left out: what a store sends is not ours to log.
        .with_notify(|event: RetryEvent<'_>| {
            tracing::debug!(attempt = event.attempt, kind = %event.err.kind(), "a request to a store is tried again");
        });
    // In this order: a deadline outside of the retries would lose a writer's state.
    operator.layer(deadlines).layer(retries)
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;
    use crate::{Uri, is_transient};

    #[tokio::test]
    async fn a_region_is_asked_for_once_and_never_guessed_when_nobody_answers() {
        let query = form_urlencoded::parse(b"AUTH=implicit");
        let (bucket, regions) = (Bucket::parse("b", "/p", query).unwrap(), Regions::default());
        let place = Place::plain("s3://b/p");
        let silence = || timeout(Duration::from_millis(1), pending());
        let error = bucket.told(&place, &regions, silence()).await.unwrap_err();
        assert!(is_transient(&error), "{error:?}");
        assert_eq!(bucket.told(&place, &regions, async { Ok(None) }).await.unwrap(), DEFAULT_REGION);
        let named = async { Ok(Some("eu-north-1".to_owned())) };
        assert_eq!(bucket.told(&place, &regions, named).await.unwrap(), "eu-north-1");
        assert_eq!(bucket.told(&place, &regions, silence()).await.unwrap(), "eu-north-1");
    }

    #[test]
    fn parameters_are_known_and_complete_or_refused() {
        let keys = "AWS_ACCESS_KEY_ID=hunter1&AWS_SECRET_ACCESS_KEY=hunter2";
        for (text, message) in [
            ("s3://b/p".to_owned(), "AUTH is set to 'specified', but AWS_ACCESS_KEY_ID is not set"),
            (
                "s3://b/p?AUTH=specified&AWS_ACCESS_KEY_ID=x".to_owned(),
                "AUTH is set to 'specified', but AWS_SECRET_ACCESS_KEY is not set",
            ),
            ("s3://b/p?AUTH=magic".to_owned(), "unsupported value magic for AUTH"),
            (format!("s3://b/p?AUTH=implicit&{keys}"), "AUTH is set to 'implicit', but AWS_ACCESS_KEY_ID is set"),
            (format!("s3://b/p?{keys}&ASSUME_ROLE=r&X=y"), "unknown s3 query parameters: ASSUME_ROLE, X"),
            (
                format!("s3://b/p?{keys}&AWS_SECRET_ACCESS_KEY=other"),
                "s3 query parameter AWS_SECRET_ACCESS_KEY is given more than once",
            ),
            (format!("s3:///p?{keys}"), "host component of s3 URI must be a bucket"),
            (format!("s3://hunter1:hunter2@b/p?{keys}"), "host component of s3 URI must be a bucket"),
            (format!("s3://b/a/../../c?{keys}"), "path component of s3 URI must not have segments \".\" or \"..\""),
            (format!("s3://b/p?{keys}&AWS_USE_PATH_STYLE=maybe"), "AWS_USE_PATH_STYLE must be true or false"),
            (
                format!("s3://b.c/p?{keys}&AWS_USE_PATH_STYLE=false"),
                "a bucket with a dot in its name needs AWS_USE_PATH_STYLE=true",
            ),
            (
                format!("s3://b/p?{keys}&AWS_ENDPOINT=http://u:hunter2@h"),
                "AWS_ENDPOINT must be an http or https URL without user, query and fragment",
            ),
            (
                format!("s3://b/p?{keys}&AWS_ENDPOINT=minio:9000"),
                "AWS_ENDPOINT must be an http or https URL without user, query and fragment",
            ),
        ] {
            let error = Uri::parse(&text).unwrap_err();
            assert_eq!((error.code.as_str(), error.message.as_str()), ("22023", message));
            assert!(!format!("{error:?}").contains("hunter"), "{error:?}");
        }
        let whole =
            format!("s3://b/p?{keys}&AWS_REGION=r&AWS_ENDPOINT=http://h:1&AWS_USE_PATH_STYLE=true&AUTH=specified");
        let uri = Uri::parse(&whole).unwrap();
        assert!(!uri.uses_rights_of_the_node());
        assert!(!format!("{uri} {uri:?}").contains("hunter2"));
        assert!(Uri::parse("s3://b/p?AUTH=implicit").unwrap().uses_rights_of_the_node());
    }
}
