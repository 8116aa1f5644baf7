//! Files that hold secrets.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use zeroize::Zeroizing;

use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;

/// Mode bits that such a file must not have: anything for everyone, writing for the group. The
/// group may read, since that is how systemd hands over credentials.
const MODE_FORBIDDEN: u32 = 0o027;

/// Reads a secret of at most `bytes_max` bytes for `op`.
///
/// # Errors
/// `InvalidRequest` if the file cannot be read, is longer, or others can get at it.
pub fn read(op: &'static str, path: &Path, bytes_max: u64) -> Result<Zeroizing<String>> {
    let bad = || Error::new(ErrorKind::InvalidRequest, op).context(path.display());
    let mut text = Zeroizing::new(String::new());
    let mut read = || {
        let file = OpenOptions::new().read(true).open(path)?;
        let mode = file.metadata()?.permissions().mode();
        file.take(bytes_max + 1).read_to_string(&mut text).map(|_| mode)
    };
    let mode = read().map_err(|error| bad().source(error))?;
    if mode & MODE_FORBIDDEN != 0 {
        return Err(bad().context(format_args!(
            "it has mode {:04o}, so others can get at it: chmod 0600 it",
            mode & 0o7777
        )));
    }
    if text.len() as u64 > bytes_max {
        return Err(bad().context(format_args!("it has more than {bytes_max} bytes")));
    }
    Ok(text)
}
