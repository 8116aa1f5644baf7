//! Where a node's API is, and how to get in: a Unix socket, or a TCP address with TLS and a token.

use std::fmt;
use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;

use hyper::Uri;
use hyper::header::HeaderValue;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::ClientConfig;
use tokio_rustls::rustls::RootCertStore;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::pki_types::pem::PemObject;

/// How every URL of a node begins: there is no API over TCP without TLS.
pub const URL_PREFIX: &str = "https://";

/// Where a node's API is.
#[derive(Clone, Debug)]
pub enum Endpoint {
    /// On this machine, at this socket. Its mode says who may connect.
    Unix(PathBuf),
    /// Anywhere.
    Https(Https),
}

/// A TCP address with all that is needed to trust it and to be trusted there.
#[derive(Clone)]
pub struct Https {
    /// As it was given, for people.
    url: String,
    pub(crate) host: String,
    pub(crate) port: u16,
    /// What the certificate must be for.
    pub(crate) name: ServerName<'static>,
    /// `Bearer` and the token.
    pub(crate) authorization: HeaderValue,
    pub(crate) tls: TlsConnector,
}

impl Endpoint {
    /// The node at `url`, as in `https://storage1:9443`: its certificate must come from an issuer
    /// in the PEM file `ca`, and it is shown the token in `token_file`. The system's own issuers
    /// are not trusted: whoever runs the node knows who signed for it.
    ///
    /// # Errors
    /// A sentence for whoever gave one of them.
    pub fn https(url: &str, token_file: &Path, ca: &Path) -> Result<Self, String> {
        let (host, port) = host_and_port(url)?;
        let name = ServerName::try_from(host.clone())
            .map_err(|_| format!("'{url}' has no host that a certificate could be for"))?;
        let token = fs::read_to_string(token_file)
            .map_err(|error| format!("read token file {}: {error}", token_file.display()))?;
        let mut authorization = HeaderValue::from_str(&format!("Bearer {}", token.trim()))
            .map_err(|_| format!("token file {} holds no token", token_file.display()))?;
        authorization.set_sensitive(true);
        let tls = connector(ca)?;
        Ok(Self::Https(Https { url: url.to_owned(), host, port, name, authorization, tls }))
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(socket) => socket.display().fmt(f),
            Self::Https(Https { url, .. }) => f.write_str(url),
        }
    }
}

impl fmt::Debug for Https {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Https").field("url", &self.url).finish_non_exhaustive()
    }
}

fn host_and_port(url: &str) -> Result<(String, u16), String> {
    let wrong = || format!("'{url}' is no URL of a node: write https://HOST:PORT");
    let uri: Uri = url.parse().map_err(|_| wrong())?;
    let plain = uri.scheme_str() == Some("https") && uri.query().is_none();
    let host = uri.host().filter(|_| plain && uri.path() == "/").ok_or_else(wrong)?;
    // What cannot be a port is none to `Uri`.
    let port = uri.authority().and_then(|all| all.as_str().strip_prefix(host)).ok_or_else(wrong)?;
    let port = match port.strip_prefix(':') {
        Some(port) => port.parse().ok().filter(|port| *port != 0).ok_or_else(wrong)?,
        None => 443,
    };
    let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    Ok((host, port))
}

fn connector(ca: &Path) -> Result<TlsConnector, String> {
    let failed = |error: &dyn fmt::Display| format!("read issuers from {}: {error}", ca.display());
    let mut roots = RootCertStore::empty();
    let certificates = CertificateDer::pem_file_iter(ca).map_err(|error| failed(&error))?;
    for certificate in certificates {
        let certificate = certificate.map_err(|error| failed(&error))?;
        roots.add(certificate).map_err(|error| failed(&error))?;
    }
    if roots.is_empty() {
        return Err(failed(&"no certificate in it"));
    }
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| failed(&error))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_a_host_and_a_port_and_nothing_else() {
        let parsed = |url| host_and_port(url).expect(url);
        assert_eq!(parsed("https://storage1:9443"), ("storage1".to_owned(), 9443));
        assert_eq!(parsed("https://[::1]:9443/"), ("::1".to_owned(), 9443));
        assert_eq!(parsed("https://10.0.0.1"), ("10.0.0.1".to_owned(), 443));
        for url in ["", "http://a:1", "https://", "https://a/v1", "https://a?b", "a:1", "/a.sock"] {
            assert!(host_and_port(url).is_err(), "{url}");
        }
        for port in ["99999", "65536", "0", "-1", "x", ""] {
            assert!(host_and_port(&format!("https://a:{port}")).is_err(), "{port}");
        }
        assert!(host_and_port("https://me@a:1").is_err());
    }
}
