//! A log file of bounded size: what it is full of becomes `NAME.1`, in place of the one before.

use std::fs;
use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::path::PathBuf;

/// Bytes of a file at which the next one is begun; two are kept. Arbitrary: weeks of an ordinary
/// node's lines, minutes of everything.
const BYTES_MAX: u64 = 16 << 20;

/// The file, and where it is. Each write is a whole line.
#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    file: File,
    bytes: u64,
    bytes_max: u64,
}

impl LogFile {
    /// Opens the file to add to it; there need not be one.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn open(path: PathBuf) -> io::Result<Self> {
        let file = append(&path)?;
        let bytes = file.metadata()?.len();
        Ok(Self { path, file, bytes, bytes_max: BYTES_MAX })
    }

    /// Begins a new file.
    fn rotate(&mut self) -> io::Result<()> {
        let mut old = self.path.clone().into_os_string();
        old.push(".1");
        fs::rename(&self.path, old)?;
        self.file = append(&self.path)?;
        self.bytes = 0;
        Ok(())
    }
}

impl Write for LogFile {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.bytes >= self.bytes_max && self.rotate().is_err() {
            // A file that is too long is better than lines lost; try again one length later.
            self.bytes = 0;
        }
        let written = self.file.write(line)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_files_are_kept_and_no_line_is_cut() {
        let directory = std::env::temp_dir().join(format!("weft-log-{}", std::process::id()));
        fs::create_dir(&directory).expect("created");
        let path = directory.join("weft.log");
        fs::write(&path, "of the run before\n").expect("written");
        let mut log = LogFile::open(path.clone()).expect("opened");
        log.bytes_max = 100;
        for number in 0..50 {
            log.write_all(format!("line {number:03}\n").as_bytes()).expect("written");
        }
        let old = fs::read_to_string(directory.join("weft.log.1")).expect("read");
        let new = fs::read_to_string(&path).expect("read");
        let both = format!("{old}{new}");
        let expected: String = (0..50).map(|number| format!("line {number:03}\n")).collect();
        assert!(expected.ends_with(&both) && !both.is_empty(), "{both}");
        assert!(old.len() >= 100 && old.len() < 110 && new.len() < 110, "{old} {new}");
        assert_eq!(fs::read_dir(&directory).expect("read").count(), 2);
        fs::remove_dir_all(&directory).expect("removed");
    }
}
