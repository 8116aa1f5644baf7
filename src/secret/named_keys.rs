//! Pre-shared keys of NBD hosts: a file like psktool of GnuTLS writes, a line `NAME:HEX` for each.

use std::collections::BTreeMap;
use std::path::Path;

use zeroize::Zeroizing;

use super::file;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;

/// Keys by the names of those who have them.
pub type NamedKeys = BTreeMap<Vec<u8>, Zeroizing<Vec<u8>>>;

/// Shortest key, in bytes: 128 bits, which nobody guesses. psktool makes 256.
const KEY_BYTES_MIN: usize = 16;
/// Longest file: some ten thousand hosts.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Reads such a file.
///
/// # Errors
/// `InvalidRequest` names the file, the line and what is wrong with it, never the key.
pub fn load(path: &Path) -> Result<NamedKeys> {
    const OP: &str = "read pre-shared keys";
    let wrong = || Error::new(ErrorKind::InvalidRequest, OP).context(path.display());
    let text = file::read(OP, path, FILE_BYTES_MAX)?;
    let keys = parse(&text)
        .map_err(|(line, reason)| wrong().context(format_args!("line {line}: {reason}")))?;
    if keys.is_empty() {
        return Err(
            wrong().context("no key in it: psktool --username NAME --pskfile FILE makes one")
        );
    }
    Ok(keys)
}

/// Keys by name; or the line that is wrong, counted from 1, and how.
fn parse(text: &str) -> std::result::Result<NamedKeys, (usize, &'static str)> {
    let mut keys = BTreeMap::new();
    for (line, number) in text.lines().map(str::trim_end).zip(1..) {
        if line.is_empty() {
            continue;
        }
        let (name, key) = line.split_once(':').ok_or((number, "is not NAME:HEX"))?;
        if name.is_empty() || name.starts_with('#') {
            // GnuTLS has `#` before names in hexadecimal.
            return Err((number, "has no name, or one that begins with '#'"));
        }
        let key = from_hex(key).ok_or((number, "has a key that is not hexadecimal"))?;
        if key.len() < KEY_BYTES_MIN {
            return Err((number, "has a key of less than 16 bytes"));
        }
        if keys.insert(name.as_bytes().to_vec(), key).is_some() {
            return Err((number, "has a name that an earlier line has"));
        }
    }
    Ok(keys)
}

fn from_hex(text: &str) -> Option<Zeroizing<Vec<u8>>> {
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let bytes = pairs.iter().map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?));
    let bytes = Zeroizing::new(bytes.collect::<Option<Vec<u8>>>()?);
    rest.is_empty().then_some(bytes)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn lines_are_names_and_keys() {
        let key = "00112233445566778899aabbccddeefF";
        let keys = parse(&format!("alice:{key}\n\nb o b:{key}{key}\r\n")).expect("right");
        let lengths: Vec<_> = keys.iter().map(|(name, key)| (name.as_slice(), key.len())).collect();
        assert_eq!(lengths, [(b"alice".as_slice(), 16), (b"b o b", 32)]);
        assert_eq!(keys[b"alice".as_slice()][14..], [0xee, 0xff]);
        for (text, line) in [
            (key.to_owned(), 1),
            (format!("alice:{key}\n:{key}"), 2),
            (format!("#616c:{key}"), 1),
            (format!("alice:{key}0"), 1),
            (format!("alice:{key}0g"), 1),
            ("alice:001122".to_owned(), 1),
            (format!("alice:{key}\nbob:{key}\nalice:{key}"), 3),
        ] {
            assert_eq!(parse(&text).expect_err("wrong").0, line, "{text}");
        }
    }

    #[test]
    fn files_that_others_may_read_or_without_a_key_are_refused() {
        let path = std::env::temp_dir().join(format!("weft-nbd-keys-{}", std::process::id()));
        let verdict = |content: &str, mode| {
            fs::write(&path, content).expect("written");
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("set");
            load(&path).map(drop).map_err(|error| error.chain())
        };
        let line = format!("alice:{}\n", "5a".repeat(32));
        let (right, open, empty) =
            (verdict(&line, 0o600), verdict(&line, 0o644), verdict("\n", 0o600));
        let wrong = verdict("alice:secret\n", 0o600).expect_err("refused");
        fs::remove_file(&path).expect("there");
        assert!(right.is_ok() && open.is_err() && empty.is_err());
        assert!(wrong.contains("line 1") && !wrong.contains("secret"), "{wrong}");
        assert!(load(&path).is_err(), "it is not there any more");
    }
}
