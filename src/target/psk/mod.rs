//! TLS 1.3 with pre-shared keys: sessions through s2n-tls, keys from whoever knows them.
//!
//! Always with a Diffie-Hellman exchange (psk_dhe_ke), so that a key that leaks later opens nothing
//! that was recorded before; no certificates, no tickets, no early data. rustls has no external
//! keys: see `docs/decisions/0021-tls-psk.md`.
//!
//! # Invariants
//! * A session is only ever had with who has the key of the identity that [`Secured::identity`]
//!   names: the library is given that one key for the connection, and no certificate.
//! * A handshake costs a few HMACs for at most a few identities, and one Diffie-Hellman exchange
//!   only for who has a key.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::OnceLock;

use s2n_tls::callbacks::ClientHelloCallback;
use s2n_tls::callbacks::ConnectionFuture;
use s2n_tls::config::Config;
use s2n_tls::connection::Builder;
use s2n_tls::connection::Connection;
use s2n_tls::enums::Mode;
use s2n_tls::enums::PskHmac;
use s2n_tls::error::Error;
use s2n_tls::psk;
use s2n_tls::security::Policy;
use s2n_tls_tokio::TlsAcceptor;

use crate::secret::Hash;
use crate::target::hkdf::Secret;
use crate::target::psk::hello::Hello;
use crate::target::psk::stream::PskStream;
use crate::target::stream::Socket;

mod hello;
pub mod stream;

/// TLS 1.3 only; X25519, P-256 and P-384; of its cipher suites the two of [`SUITES`] come before
/// the third, which is refused below.
const POLICY: &str = "AWS-CRT-SDK-TLSv1.3";
/// The cipher suites there are: one for each hash of keys. (NVMe/TCP 1.1, 3.6.1)
const SUITES: [&str; 2] = ["TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384"];

/// A key that an identity may stand for.
pub struct Candidate {
    /// The hash it is for.
    pub hash: Hash,
    /// The key.
    pub key: Secret,
}

/// A connection that is encrypted.
pub struct Secured {
    /// It.
    pub stream: PskStream,
    /// What its key is known by.
    pub identity: Vec<u8>,
}

/// Why there is no session.
#[derive(Debug)]
pub enum Refused {
    /// No key is known for any identity that was offered; this is the first.
    UnknownIdentity(Vec<u8>),
    /// There are keys for this identity, and the client has none of them.
    WrongKey(Vec<u8>),
    /// It offers no keys, or speaks no TLS 1.3, or breaks the protocol, or is gone.
    Failed(Error),
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownIdentity(identity) => write!(f, "no key for '{}'", printable(identity)),
            Self::WrongKey(identity) => write!(f, "another key for '{}'", printable(identity)),
            Self::Failed(error) => write!(f, "TLS handshake: {}", error.message()),
        }
    }
}

/// An identity for logs: a client may send any bytes, and many.
fn printable(identity: &[u8]) -> String {
    const SHOWN_BYTES_MAX: usize = 512;
    identity.get(..SHOWN_BYTES_MAX).unwrap_or(identity).escape_ascii().to_string()
}

/// Turns connections into sessions.
pub struct Acceptor {
    config: Config,
}

impl Acceptor {
    /// Of keys that `find` knows: those an identity may stand for, the likeliest first.
    #[must_use]
    pub fn new(find: impl Fn(&[u8]) -> Vec<Candidate> + Send + Sync + 'static) -> Self {
        let config = config(Choice { find }).expect("what the library has, and no memory but ours");
        Self { config }
    }

    /// Does the handshake. What the client has sent must not have been read.
    ///
    /// # Cancellation
    /// Dropping it closes the connection.
    ///
    /// # Errors
    /// Why there is no session; the connection is closed.
    pub async fn accept(&self, socket: Socket) -> Result<Secured, Refused> {
        let chosen = Arc::new(OnceLock::new());
        let session = Session { config: self.config.clone(), chosen: Arc::clone(&chosen) };
        let accepted = TlsAcceptor::new(session).accept(socket).await;
        let identity = match (chosen.get(), accepted.as_ref().err()) {
            (Some(Chosen::Identity(identity)), None) => identity.clone(),
            (Some(Chosen::Unknown(first)), _) => {
                return Err(Refused::UnknownIdentity(first.clone()));
            }
            (Some(Chosen::WrongKey(identity)), _) => {
                return Err(Refused::WrongKey(identity.clone()));
            }
            (None | Some(Chosen::Identity(_)), _) => Vec::new(),
        };
        let stream = accepted.map_err(Refused::Failed)?;
        let suite = stream.as_ref().cipher_suite().map_err(Refused::Failed)?;
        if identity.is_empty() || !SUITES.contains(&suite) {
            return Err(Refused::Failed(Error::application("another cipher suite".into())));
        }
        Ok(Secured { stream: PskStream::new(stream), identity })
    }
}

/// What the keys of a client came to.
enum Chosen {
    /// It has the key of this identity.
    Identity(Vec<u8>),
    /// It has none of this one's.
    WrongKey(Vec<u8>),
    /// None is known for its identities; this is the first.
    Unknown(Vec<u8>),
}

/// What a connection's [`Choice`] is told to the one who accepts it by.
type Told = Arc<OnceLock<Chosen>>;

/// Makes the library's half of one connection.
#[derive(Clone)]
struct Session {
    config: Config,
    chosen: Told,
}

impl Builder for Session {
    type Output = Connection;

    fn build_connection(&self, mode: Mode) -> Result<Connection, Error> {
        let mut connection = self.config.build_connection(mode)?;
        connection.set_application_context(Arc::clone(&self.chosen));
        // Many commands come in one receive, and records are as long as they may be.
        connection.set_receive_buffering(true)?;
        connection.prefer_throughput()?;
        Ok(connection)
    }
}

fn config(choice: impl ClientHelloCallback) -> Result<Config, Error> {
    let mut config = Config::builder();
    config.set_security_policy(&Policy::from_version(POLICY)?)?;
    config.set_client_hello_callback(choice)?;
    // The delay of answers to wrong records is against padding oracles, which ciphers of TLS 1.3 do
    // not have; it would only keep those waiting who mistyped a key.
    config.set_max_blinding_delay(0)?;
    config.build()
}

/// Chooses a client's key by what it says first.
struct Choice<F> {
    find: F,
}

impl<F: Fn(&[u8]) -> Vec<Candidate> + Send + Sync + 'static> ClientHelloCallback for Choice<F> {
    fn on_client_hello(
        &self,
        connection: &mut Connection,
    ) -> Result<Option<Pin<Box<dyn ConnectionFuture>>>, Error> {
        let told = connection.application_context::<Told>().map(Arc::clone);
        let told = told.ok_or_else(|| Error::application("not made by Session".into()))?;
        let hello = connection.client_hello()?;
        let hello = Hello::parse(&hello.raw_message()?, &hello.random()?)
            .ok_or_else(|| Error::application("no pre-shared key is offered".into()))?;
        let (chosen, key) = self.choose(&hello);
        if let (Chosen::Identity(identity), Some(key)) = (&chosen, key) {
            connection.append_psk(&library_key(identity, &key)?)?;
        }
        let proven = matches!(chosen, Chosen::Identity(_));
        let _ = told.set(chosen);
        if proven { Ok(None) } else { Err(Error::application("it has no key of ours".into())) }
    }
}

impl<F: Fn(&[u8]) -> Vec<Candidate>> Choice<F> {
    /// The first identity whose key the client has, and that key.
    fn choose(&self, hello: &Hello) -> (Chosen, Option<Candidate>) {
        let mut wrong = None;
        for identity in hello.identities() {
            let candidates = (self.find)(identity);
            if !candidates.is_empty() {
                wrong.get_or_insert(identity);
            }
            let proven = |one: &Candidate| hello.proves(identity, one.hash, &one.key);
            if let Some(candidate) = candidates.into_iter().find(proven) {
                return (Chosen::Identity(identity.to_vec()), Some(candidate));
            }
        }
        let first = || hello.identities().next().unwrap_or_default().to_vec();
        (wrong.map_or_else(|| Chosen::Unknown(first()), |one| Chosen::WrongKey(one.to_vec())), None)
    }
}

fn library_key(identity: &[u8], candidate: &Candidate) -> Result<psk::Psk, Error> {
    let hash = match candidate.hash {
        Hash::Sha256 => PskHmac::SHA256,
        Hash::Sha384 => PskHmac::SHA384,
        Hash::Sha512 => return Err(Error::application("no cipher suite has SHA-512".into())),
    };
    let mut key = psk::Builder::new()?;
    key.set_identity(identity)?.set_secret(&candidate.key)?.set_hmac(hash)?;
    key.build()
}
