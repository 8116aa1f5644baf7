//! The node's configuration, and the files it names.

use std::path::Path;
use std::path::PathBuf;

use super::facts::Facts;
use super::finding::Finding;
use crate::cli::shell_word;
use crate::node::config::TlsProof;
use crate::secret::named_keys;

pub(super) fn config(facts: &Facts) -> Vec<Finding> {
    let file = facts.asked.config_file.as_deref();
    vec![match (&facts.asked.config, file) {
        (None, _) => Finding::skip("not read"),
        // It names the file and the line.
        (Some(Err(reason)), _) => Finding::error(
            reason.clone(),
            "weft --print-config, which shows every key with what it may be",
        ),
        (Some(Ok(_)), None) => Finding::ok("the defaults; --config FILE for others"),
        (Some(Ok(_)), Some(file)) => Finding::ok("valid").on(file.display().to_string()),
    }]
}

/// The files of TLS, if it is on.
pub(super) fn tls(facts: &Facts) -> Vec<Finding> {
    let Some(config) = facts.config() else { return Vec::new() };
    let Some(tls) = &config.nbd.tls else { return vec![Finding::skip("nbd.tls.mode is \"off\"")] };
    let on = |finding: Finding, file: &Path| finding.on(file.display().to_string());
    match &tls.proof {
        TlsProof::Certificates { certificate, key, client_ca } => {
            let public = [certificate].into_iter().chain(client_ca);
            let mut found: Vec<_> = public.map(|file| on(pem(facts, file, false), file)).collect();
            found.insert(1, on(pem(facts, key, true), key));
            found
        }
        // The very reading that a start does.
        TlsProof::Keys { psk_file } => vec![on(
            match named_keys::load(&facts.real(&absolute(psk_file))) {
                Ok(_) => Finding::ok("readable"),
                Err(error) => Finding::error(
                    error.chain(),
                    format!("psktool --username NAME --pskfile {}", shell_word(psk_file)),
                ),
            },
            psk_file,
        )],
    }
}

/// What the configuration says begins where weft was started.
fn absolute(file: &Path) -> PathBuf {
    std::path::absolute(file).unwrap_or_else(|_| file.to_owned())
}

fn pem(facts: &Facts, file: &Path, secret: bool) -> Finding {
    let path = shell_word(file);
    let absolute = absolute(file);
    let Some(text) = facts.text(&absolute) else {
        return Finding::error("cannot be read", format!("ls -l {path}"));
    };
    if !text.contains("-----BEGIN ") {
        return Finding::error(
            "is no PEM file",
            format!("openssl x509 -in {path} -out {path}.pem"),
        );
    }
    if secret && facts.mode(&absolute).is_some_and(|mode| mode & 0o007 != 0) {
        return Finding::warn("a private key that everybody may read", format!("chmod o= {path}"));
    }
    Finding::ok("readable")
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::cli::doctor::facts::Asked;
    use crate::cli::doctor::facts::fake::System;
    use crate::cli::doctor::facts::fake::configured;
    use crate::cli::doctor::finding::Verdict;

    #[test]
    fn a_wrong_configuration_is_an_error() {
        let wrong = Asked { config: Some(Err("weft.toml:1: x".into())), ..Asked::default() };
        assert_eq!(System::new(&[]).verdict(config, wrong), Verdict::Error);
        assert_eq!(System::new(&[]).verdict(config, configured("")), Verdict::Ok);
    }

    #[test]
    fn files_of_tls_must_be_there_and_the_key_be_private() {
        let text = "[nbd.tls]\nmode = \"required\"\ncertificate = \"/etc/weft/c.pem\"\n\
                    key = \"/etc/weft/k.pem\"\n";
        let verdicts = |files: &[(&str, &str)], mode| {
            let system = System::new(files);
            let key = system.path("/etc/weft/k.pem");
            if key.exists() {
                fs::set_permissions(key, fs::Permissions::from_mode(mode)).expect("changed");
            }
            let found = system.says(tls, configured(text));
            found.iter().map(|finding| finding.verdict).collect::<Vec<_>>()
        };
        let pem = "-----BEGIN SOMETHING-----\n";
        let files = [("/etc/weft/c.pem", pem), ("/etc/weft/k.pem", pem)];
        assert_eq!(verdicts(&files, 0o600), [Verdict::Ok, Verdict::Ok]);
        assert_eq!(verdicts(&files, 0o644), [Verdict::Ok, Verdict::Warn]);
        assert_eq!(verdicts(&[("/etc/weft/c.pem", "x")], 0), [Verdict::Error, Verdict::Error]);
        assert_eq!(System::new(&[]).verdict(tls, configured("")), Verdict::Skip);
    }

    #[test]
    fn the_file_of_pre_shared_keys_must_be_one() {
        let verdict = |content| {
            let system = System::new(&[("/etc/weft/k.psk", content)]);
            let mode = fs::Permissions::from_mode(0o600);
            fs::set_permissions(system.path("/etc/weft/k.psk"), mode).expect("changed");
            let text = "nbd.tls.mode = \"required\"\nnbd.tls.psk_file = \"/etc/weft/k.psk\"\n";
            system.verdict(tls, configured(text))
        };
        assert_eq!(verdict("alice:00112233445566778899aabbccddeeff\n"), Verdict::Ok);
        assert_eq!(verdict("alice\n"), Verdict::Error);
    }
}
