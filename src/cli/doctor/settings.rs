//! The node's configuration, and the files it names.

use std::path::Path;

use super::facts::Facts;
use super::finding::Finding;
use crate::cli::shell_word;

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

/// The PEM files of TLS, if it is on.
pub(super) fn tls(facts: &Facts) -> Vec<Finding> {
    let Some(config) = facts.config() else { return Vec::new() };
    let Some(tls) = &config.nbd.tls else { return vec![Finding::skip("nbd.tls.mode is \"off\"")] };
    let files = [Some((&tls.certificate, false)), Some((&tls.key, true))];
    let ca = tls.client_ca.as_ref().map(|file| (file, false));
    let judge = |(file, secret): (&std::path::PathBuf, bool)| {
        pem(facts, file, secret).on(file.display().to_string())
    };
    files.into_iter().chain([ca]).flatten().map(judge).collect()
}

fn pem(facts: &Facts, file: &Path, secret: bool) -> Finding {
    let path = shell_word(file);
    // What the configuration says begins where weft was started.
    let absolute = std::path::absolute(file).unwrap_or_else(|_| file.to_owned());
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
}
