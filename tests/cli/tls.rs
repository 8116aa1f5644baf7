//! TLS that is required: of hosts on TCP, never of those on the Unix socket.

use std::fs;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use crate::support::ERROR_TLS_REQUIRED;
use crate::support::Node;
use crate::support::REPLY_INFO;
use crate::support::Scratch;
use crate::support::plain_answer;

#[test]
fn required_tls_is_for_tcp_and_the_unix_socket_stays_plain() {
    let scratch = Scratch::new();
    let key = rcgen::KeyPair::generate().expect("generated");
    let parameters = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).expect("a name");
    let certificate = parameters.self_signed(&key).expect("signed");
    fs::write(scratch.path("node.pem"), certificate.pem()).expect("written");
    fs::write(scratch.path("node.key"), key.serialize_pem()).expect("written");
    let config = scratch.config(&format!(
        "pod.device_size = \"256MiB\"\nnbd.tls.mode = \"required\"\nnbd.tls.certificate = {:?}\n\
         nbd.tls.key = {:?}",
        scratch.path("node.pem").display(),
        scratch.path("node.key").display()
    ));
    let node = Node::start(&scratch, &config);

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
