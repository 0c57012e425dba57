//! Texts that must stand in the registry's tables and that not everybody who reads those may read.
//!
//! AES-256-GCM with a key that HKDF-SHA256 derives from the cluster secret, so that a dump of the registry, or a
//! standby of its server, does not give away the keys of the buckets. **An insecure fleet has no secret**: there the
//! key comes from the cluster's id, which stands in the same registry, and sealing hides nothing from whoever reaches
//! that; it only keeps the text from being read in passing.

use anyhow::{anyhow, ensure};
use pgerror::{PgError, SqlState};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, Salt};
use ring::rand::{SecureRandom as _, SystemRandom};
use uuid::Uuid;

/// What is sealed under another format would have another one.
const SALT: &[u8] = b"backhaul seal 1";

/// Seals and opens with one fleet's key.
pub struct Seal {
    key: LessSafeKey,
    random: SystemRandom,
}

impl std::fmt::Debug for Seal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Seal")
    }
}

impl Seal {
    /// The fleet's own: from its secret, or, in an insecure fleet, from its id alone.
    pub fn new(secret: Option<&str>, cluster_id: Uuid) -> Self {
        let source = secret.map_or(cluster_id.as_bytes().as_slice(), str::as_bytes);
        let derived = Salt::new(HKDF_SHA256, SALT).extract(source);
        let info = [cluster_id.as_bytes().as_slice()];
        let okm = derived.expand(&info, &AES_256_GCM).expect("HKDF can make as many bytes as one key has");
        Self { key: LessSafeKey::new(UnboundKey::from(okm)), random: SystemRandom::new() }
    }

    /// The sealed text: a nonce, then the ciphertext with its tag. Sealing the same text again gives other bytes.
    ///
    /// # Errors
    ///
    /// The system has no random bytes to give.
    pub fn seal(&self, plain: &str) -> anyhow::Result<Vec<u8>> {
        let mut nonce = [0; NONCE_LEN];
        self.random.fill(&mut nonce).map_err(|_| anyhow!("draw a nonce"))?;
        let mut body = plain.as_bytes().to_vec();
        let tagged = self.key.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::empty(), &mut body);
        tagged.map_err(|_| anyhow!("seal a text"))?;
        Ok([nonce.as_slice(), &body].concat())
    }

    /// The text that was sealed.
    ///
    /// # Errors
    ///
    /// It was sealed with another secret, or is damaged.
    pub fn open(&self, sealed: &[u8]) -> anyhow::Result<String> {
        ensure!(sealed.len() >= NONCE_LEN, "a sealed text is at least as long as its nonce");
        let (nonce, body) = sealed.split_at(NONCE_LEN);
        let mut body = body.to_vec();
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| anyhow!("read a nonce"))?;
        let plain = self.key.open_in_place(nonce, Aad::empty(), &mut body).map_err(|_| {
            let message = "a sealed text cannot be opened with this fleet's cluster secret";
            PgError::new(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, message)
                .hint("If the secret was changed, drop what was sealed with the old one and create it again.")
        })?;
        Ok(std::str::from_utf8(plain)?.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_opens_with_the_same_secret_in_the_same_fleet_only() {
        let fleet = Uuid::new_v4();
        let plain = "s3://b?AWS_SECRET_ACCESS_KEY=hunter2";
        let seal = Seal::new(Some("secret"), fleet);
        let sealed = seal.seal(plain).unwrap();
        assert_eq!(seal.open(&sealed).unwrap(), plain);
        assert_eq!(Seal::new(Some("secret"), fleet).open(&sealed).unwrap(), plain);
        assert_ne!(seal.seal(plain).unwrap(), sealed);
        assert!(!sealed.windows(7).any(|bytes| bytes == b"hunter2"));
        for other in
            [Seal::new(Some("other"), fleet), Seal::new(Some("secret"), Uuid::new_v4()), Seal::new(None, fleet)]
        {
            let error = other.open(&sealed).unwrap_err();
            assert_eq!(PgError::of(&error).unwrap().code, SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE);
        }
    }

    #[test]
    fn what_is_damaged_does_not_open() {
        let seal = Seal::new(None, Uuid::new_v4());
        let sealed = seal.seal("").unwrap();
        assert_eq!(seal.open(&sealed).unwrap(), "");
        for at in 0..sealed.len() {
            let mut damaged = sealed.clone();
            damaged[at] ^= 1;
            assert!(seal.open(&damaged).is_err());
            assert!(seal.open(&sealed[..at]).is_err());
        }
    }
}
