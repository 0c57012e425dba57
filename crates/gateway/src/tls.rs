//! TLS: the node's own certificate towards clients, and whom the node trusts as another node.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::TlsAcceptor;

/// What a node speaks.
#[derive(Clone, Default)]
pub struct Tls {
    /// With a certificate, clients and nodes may ask for TLS.
    pub(crate) to_clients: Option<TlsAcceptor>,
    /// With a certificate authority, this node insists on TLS towards others.
    pub(crate) to_nodes: Option<Arc<ClientConfig>>,
}

impl Tls {
    /// Reads a directory as CockroachDB's `--certs-dir`: `node.crt` and `node.key`, and `ca.crt` where nodes are to
    /// speak TLS among themselves.
    ///
    /// # Errors
    ///
    /// A file is missing, cannot be read, or holds no such thing.
    pub fn load(dir: &Path) -> anyhow::Result<Self> {
        let chain: Vec<CertificateDer<'static>> = certificates(&dir.join("node.crt"))?;
        let key_path = dir.join("node.key");
        let key = PrivateKeyDer::from_pem_slice(&read(&key_path)?)
            .with_context(|| format!("read the private key in {}", key_path.display()))?;
        let server = ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .with_context(|| format!("use the certificate in {}", dir.display()))?;
        let to_nodes = dir.join("ca.crt").exists().then(|| authority(dir)).transpose()?;
        Ok(Self { to_clients: Some(TlsAcceptor::from(Arc::new(server))), to_nodes })
    }

    /// What peer sessions of this node use.
    pub fn to_nodes(&self) -> Option<Arc<ClientConfig>> {
        self.to_nodes.clone()
    }
}

/// Whom to believe to be a node: whose certificate the directory's `ca.crt` vouches for.
///
/// # Errors
///
/// The file is missing, cannot be read, or holds no certificate.
pub fn authority(dir: &Path) -> anyhow::Result<Arc<ClientConfig>> {
    let path = dir.join("ca.crt");
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&path)? {
        roots.add(certificate).with_context(|| format!("use the certificate in {}", path.display()))?;
    }
    Ok(Arc::new(ClientConfig::builder().with_root_certificates(roots).with_no_client_auth()))
}

fn certificates(path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let bytes = read(path)?;
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    let certificates = read.with_context(|| format!("read the certificates in {}", path.display()))?;
    if certificates.is_empty() {
        bail!("{} holds no certificate", path.display());
    }
    Ok(certificates)
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("read {}", path.display()))
}
