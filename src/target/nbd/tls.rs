//! TLS for NBD: certificates from files, sessions through rustls. (proto.md, "TLS support")
//!
//! TLS 1.2 and 1.3 with X.509. rustls has no pre-shared keys: those go through
//! [`crate::target::psk`]. See `docs/decisions/0020-nbd-tls.md`.

use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;

use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::RootCertStore;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::server::WebPkiClientVerifier;

use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::secret::Hash;
use crate::secret::named_keys::NamedKeys;
use crate::target::hkdf::Secret;
use crate::target::psk::Acceptor;
use crate::target::psk::Candidate;

/// Where keys and certificates lie. All files are PEM.
#[derive(Clone, Debug, Default)]
pub struct TlsFiles {
    /// The server's certificate chain, its own first.
    pub certificate: PathBuf,
    /// The server's private key (PKCS#8, PKCS#1 or SEC1).
    pub key: PathBuf,
    /// If set, clients must present a certificate signed by one of these.
    pub client_ca: Option<PathBuf>,
}

/// What turns connections into TLS sessions.
#[derive(Clone)]
pub enum Tls {
    /// The node shows a certificate, and hosts perhaps too.
    Certificates(TlsAcceptor),
    /// Node and hosts have keys. TLS 1.3 alone, and only with who has the key of the name it gives.
    Keys(Arc<Acceptor>),
}

impl Tls {
    /// With these keys.
    #[must_use]
    pub fn with_keys(keys: NamedKeys) -> Self {
        Self::Keys(Arc::new(Acceptor::new(move |name| {
            // GnuTLS takes SHA-256 with a key; other libraries may take either.
            let both = [Hash::Sha256, Hash::Sha384];
            let candidate = |key: &Secret, hash| Candidate { hash, key: key.clone() };
            keys.get(name)
                .map(|key| both.map(|hash| candidate(key, hash)).into())
                .unwrap_or_default()
        })))
    }
}

/// Reads the files and makes what turns a connection into a TLS session.
///
/// # Errors
/// `InvalidRequest` names the file and what is wrong with it.
pub fn load(files: &TlsFiles) -> Result<TlsAcceptor> {
    let certificates = certificates(&files.certificate)?;
    let key = PrivateKeyDer::from_pem_file(&files.key)
        .map_err(|error| bad_file("read TLS private key", &files.key).source(error))?;
    let provider = Arc::new(ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| Error::new(ErrorKind::Unsupported, "set up TLS").source(error))?;
    let builder = match &files.client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for certificate in self::certificates(path)? {
                roots
                    .add(certificate)
                    .map_err(|error| bad_file("use TLS client CA", path).source(error))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                .build()
                .map_err(|error| bad_file("use TLS client CA", path).source(error))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let config = builder
        .with_single_cert(certificates, key)
        .map_err(|error| bad_file("use TLS certificate", &files.certificate).source(error))?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let read = || CertificateDer::pem_file_iter(path)?.collect::<std::result::Result<Vec<_>, _>>();
    let certificates =
        read().map_err(|error| bad_file("read TLS certificates", path).source(error))?;
    if certificates.is_empty() {
        return Err(bad_file("read TLS certificates", path).context("no certificate in it"));
    }
    Ok(certificates)
}

fn bad_file(op: &'static str, path: &Path) -> Error {
    Error::new(ErrorKind::InvalidRequest, op).context(path.display())
}
