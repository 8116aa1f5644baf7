//! TLS that is required: of hosts on TCP, never of those on the Unix socket.

use std::fs;
use std::io;
use std::io::Read;
use std::io::Write;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;

use tokio_rustls::rustls::ClientConfig;
use tokio_rustls::rustls::ClientConnection;
use tokio_rustls::rustls::RootCertStore;
use tokio_rustls::rustls::StreamOwned;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject;

use crate::support::ERROR_TLS_REQUIRED;
use crate::support::Node;
use crate::support::REPLY_INFO;
use crate::support::Scratch;
use crate::support::attach_greeted;
use crate::support::certificate;
use crate::support::plain_answer;
use crate::support::start_tls;

/// A configuration that requires TLS, with a new certificate.
pub fn config(scratch: &Scratch) -> PathBuf {
    certificate(scratch, "node");
    scratch.config(&format!(
        "pod.device_size = \"256MiB\"\nnbd.tls.mode = \"required\"\nnbd.tls.certificate = {:?}\n\
         nbd.tls.key = {:?}",
        scratch.path("node.pem").display(),
        scratch.path("node.key").display()
    ))
}

/// Connects with TLS to a node that must have the certificate in `ca`.
fn secured(address: &str, ca: &Path) -> io::Result<StreamOwned<ClientConnection, TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca).expect("readable")).expect("fit");
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let mut tcp = TcpStream::connect(address).expect("listens");
    start_tls(&mut tcp);
    let name = "localhost".try_into().expect("a name");
    let session = ClientConnection::new(Arc::new(config), name).expect("complete");
    let mut stream = StreamOwned::new(session, tcp);
    stream.conn.complete_io(&mut stream.sock)?;
    Ok(stream)
}

/// Reads the first sector of an attached volume.
fn read_sector(stream: &mut (impl Read + Write)) {
    let request = [&[0x25, 0x60, 0x95, 0x13][..], &[0; 20], &[0, 0, 2, 0]].concat();
    stream.write_all(&request).expect("sent");
    let mut answer = [0; 16 + 512];
    stream.read_exact(&mut answer).expect("answered");
    assert_eq!(answer[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0]);
}

#[test]
fn a_reload_takes_a_new_certificate_and_harms_no_session() {
    let scratch = Scratch::new();
    let node = Node::start(&scratch, &config(&scratch));
    let status = node.json(&["status"]);
    let address = status["listeners"][0]["address"].as_str().expect("an address");
    let (old, new) = (scratch.path("old.pem"), scratch.path("node.pem"));
    fs::copy(&new, &old).expect("copied");
    let mut before = secured(address, &old).expect("trusted");
    attach_greeted(&mut before);
    read_sector(&mut before);

    // A key that is not the certificate's: nothing changes.
    certificate(&scratch, "other");
    fs::copy(scratch.path("other.key"), scratch.path("node.key")).expect("copied");
    let refused = node.weft(&["reload"]);
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(refused.err.contains("node.pem"), "{refused:?}");
    secured(address, &old).expect("still trusted");

    fs::copy(scratch.path("other.pem"), &new).expect("copied");
    let done = node.weft(&["reload"]);
    assert_eq!((done.code, &*done.out), (Some(0), "certificates, keys and token are read again\n"));
    read_sector(&mut before);
    assert!(secured(address, &old).is_err(), "the old certificate is out of force");
    let mut after = secured(address, &new).expect("trusted");
    attach_greeted(&mut after);
    read_sector(&mut after);
    read_sector(&mut before);
    node.stop_despite(Some("credentials-kept"));
}

#[test]
fn required_tls_is_for_tcp_and_the_unix_socket_stays_plain() {
    let scratch = Scratch::new();
    let node = Node::start(&scratch, &config(&scratch));

    let status = node.json(&["status"]);
    let address = status["listeners"][0]["address"].as_str().expect("an address");
    let tcp = TcpStream::connect(address).expect("listens");
    assert_eq!(plain_answer(tcp), ERROR_TLS_REQUIRED);
    let unix = UnixStream::connect(node.data.join("nbd.sock")).expect("listens");
    assert_eq!(plain_answer(unix), REPLY_INFO);
    assert!(node.banner.contains(&format!("nbds://{address}/vol0")), "{}", node.banner);
    assert!(node.banner.contains("'nbd+unix:///vol0?socket="), "{}", node.banner);
    node.stop();
}
