//! What checks look at.
//!
//! Files of the system (`/proc`, `/sys`, `/etc`) are read through [`Facts`], below a root that is
//! `/` for real and a directory of a few made-up files in tests. What no file tells, such as whether
//! an address is free, is asked beforehand (`gather.rs`) and lies in [`Asked`]. So a check is a
//! function of `Facts` alone.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::Component;
use std::path::Path;
use std::path::PathBuf;

use weft_api::NodeStatus;

use crate::node::config::Config;

/// A device's number: major, minor.
pub(super) type Number = (u32, u32);

/// Where the programs of a system lie.
const PROGRAM_PLACES: &[&str] =
    &["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// The system as checks see it.
pub(super) struct Facts {
    root: PathBuf,
    pub(super) asked: Asked,
}

/// What was asked of the kernel and of other programs.
#[derive(Default)]
pub(super) struct Asked {
    /// The configuration the node would run on; what is wrong with it otherwise.
    pub(super) config: Option<Result<Config, String>>,
    /// The configuration's file; `None`: the defaults.
    pub(super) config_file: Option<PathBuf>,
    /// Whether a ring could be set up; what the kernel said otherwise.
    pub(super) ring: Option<Result<(), String>>,
    /// The directory of the node.
    pub(super) directory: DirectoryFacts,
    /// The pod's devices, in order of index.
    pub(super) devices: Vec<DeviceFacts>,
    /// Where the node is to listen.
    pub(super) listen: Vec<ListenFacts>,
    /// The node that runs on the directory.
    pub(super) node: Option<NodeStatus>,
    /// Processors this process may run on.
    pub(super) processors: usize,
    /// What programs say of themselves, by name, or of what they know.
    pub(super) answers: BTreeMap<&'static str, String>,
}

/// The node's directory.
#[derive(Clone, Debug, Default)]
pub(super) struct DirectoryFacts {
    /// Absolute.
    pub(super) path: PathBuf,
    /// Whether it exists.
    pub(super) exists: bool,
    /// Whether this user may write to it, or to the directory in which it would be made.
    pub(super) writable: bool,
    /// Whether a pod was created here: its devices are then those the directory's record names.
    pub(super) pod: bool,
    /// How many devices that pod may lose, if the record says so.
    pub(super) parity_strips: Option<usize>,
}

/// A device of the pod, or a file that would become one.
#[derive(Clone, Debug)]
pub(super) struct DeviceFacts {
    /// Absolute.
    pub(super) path: PathBuf,
    pub(super) kind: Kind,
    pub(super) opened: Opened,
    /// The disk it is, or lies on: a file's is that of its file system.
    pub(super) disk: Number,
    /// What is free in the file system that it lies in; `None` if it lies in none.
    pub(super) free_bytes: Option<u64>,
}

/// What stands at a device's path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Nothing; a directory to make it in was looked at instead.
    Missing,
    /// A file, with its length and how much of it has room on the disk already.
    File {
        length: u64,
        allocated: u64,
    },
    Block,
    /// It is something else, or cannot be looked at, as the text says.
    Other(String),
}

/// How an attempt to open a device as the node does ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Opened {
    /// Not tried.
    No,
    /// With its length in bytes, and whether O_DIRECT works.
    Yes {
        length: u64,
        direct: bool,
    },
    /// Another process has it, or the kernel.
    Busy(String),
    Refused(String),
}

/// An address to listen on.
#[derive(Clone, Debug)]
pub(super) struct ListenFacts {
    /// Key of the configuration that says so.
    pub(super) key: &'static str,
    pub(super) address: Address,
    pub(super) state: ListenState,
}

/// Distributions with the same packages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    Debian,
    Ubuntu,
    Fedora,
    Suse,
    Arch,
}

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// How an attempt to listen there ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ListenState {
    Free,
    /// Somebody listens there.
    Taken,
    /// The port is one of those for the privileged.
    Forbidden,
    Refused(String),
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

impl Facts {
    pub(super) fn new(root: impl Into<PathBuf>, asked: Asked) -> Self {
        let root = root.into();
        let root = root.canonicalize().unwrap_or(root);
        Self { root, asked }
    }

    /// The configuration, if it is valid.
    pub(super) fn config(&self) -> Option<&Config> {
        self.asked.config.as_ref().and_then(|config| config.as_ref().ok())
    }

    /// A file without the white space at its ends; `None` if it is not there or cannot be read.
    pub(super) fn text(&self, path: impl AsRef<Path>) -> Option<String> {
        let bytes = fs::read(self.real(path.as_ref())).ok()?;
        Some(String::from_utf8_lossy(&bytes).trim().to_owned())
    }

    /// A file with one number in it.
    pub(super) fn number(&self, path: impl AsRef<Path>) -> Option<u64> {
        self.text(path)?.parse().ok()
    }

    pub(super) fn exists(&self, path: impl AsRef<Path>) -> bool {
        self.real(path.as_ref()).exists()
    }

    /// Permission bits of a file.
    pub(super) fn mode(&self, path: impl AsRef<Path>) -> Option<u32> {
        use std::os::unix::fs::PermissionsExt;
        Some(fs::metadata(self.real(path.as_ref())).ok()?.permissions().mode())
    }

    /// Names in a directory, sorted; none if it cannot be listed.
    pub(super) fn names(&self, directory: impl AsRef<Path>) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.real(directory.as_ref())) else { return Vec::new() };
        let name = |entry: fs::DirEntry| entry.file_name().to_string_lossy().into_owned();
        let mut names: Vec<String> = entries.filter_map(Result::ok).map(name).collect();
        names.sort();
        names
    }

    /// The path with its links followed, as the system sees it.
    pub(super) fn canonical(&self, path: impl AsRef<Path>) -> Option<PathBuf> {
        let real = self.real(path.as_ref()).canonicalize().ok()?;
        Some(Path::new("/").join(real.strip_prefix(&self.root).ok()?))
    }

    /// Where a program lies.
    pub(super) fn program(&self, name: &str) -> Option<PathBuf> {
        PROGRAM_PLACES
            .iter()
            .map(|place| Path::new(place).join(name))
            .find(|path| self.exists(path))
    }

    /// The command that installs a package, by the name it has with Debian or with the others.
    pub(super) fn install(&self, (debian, other): (&str, &str)) -> String {
        match self.family() {
            Family::Debian | Family::Ubuntu => format!("apt-get install {debian}"),
            Family::Fedora => format!("dnf install {other}"),
            Family::Suse => format!("zypper install {other}"),
            Family::Arch => format!("pacman -S {other}"),
        }
    }

    /// The command that brings modules a small kernel lacks.
    pub(super) fn install_modules(&self) -> &'static str {
        match self.family() {
            Family::Ubuntu => "apt-get install \"linux-modules-extra-$(uname -r)\"",
            Family::Debian => {
                "apt-get install \"linux-image-$(dpkg --print-architecture)\", and reboot"
            }
            Family::Fedora => "dnf install \"kernel-modules-extra-$(uname -r)\"",
            Family::Suse => "zypper install kernel-default, and reboot",
            Family::Arch => "pacman -S linux, and reboot",
        }
    }

    /// Whose packages the system has; Debian's if it does not say.
    fn family(&self) -> Family {
        let text = self.text("/etc/os-release").unwrap_or_default();
        let names =
            text.lines().filter(|line| line.starts_with("ID=") || line.starts_with("ID_LIKE="));
        let names: Vec<&str> = names.flat_map(|line| line.split(['=', '"', ' '])).collect();
        let families = [
            ("ubuntu", Family::Ubuntu),
            ("fedora", Family::Fedora),
            ("rhel", Family::Fedora),
            ("suse", Family::Suse),
            ("arch", Family::Arch),
        ];
        let known = families.into_iter().find(|(name, _)| names.contains(name));
        known.map_or(Family::Debian, |(_, family)| family)
    }

    /// Release of the running kernel, as in `6.1.0-18-amd64`.
    pub(super) fn kernel(&self) -> Option<String> {
        self.text("/proc/sys/kernel/osrelease")
    }

    /// Major and minor version of the running kernel.
    pub(super) fn kernel_version(&self) -> Option<(u32, u32)> {
        let release = self.kernel()?;
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
        Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
    }

    /// Soft and hard limit of this process, by the name it has in /proc/self/limits; `u64::MAX`:
    /// unlimited.
    pub(super) fn limits(&self, name: &str) -> Option<(u64, u64)> {
        let text = self.text("/proc/self/limits")?;
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        let mut words = line.split_whitespace().map(|word| match word {
            "unlimited" => Some(u64::MAX),
            word => word.parse().ok(),
        });
        Some((words.next()??, words.next()??))
    }

    /// Where the mount that `path` lies in stands in the list of mounts.
    pub(super) fn mount_of(&self, path: &Path) -> Option<Mount> {
        // A later mount on the same point hides an earlier one, so the last of the longest wins.
        self.mounts()
            .into_iter()
            .filter(|mount| path.starts_with(&mount.point))
            .max_by_key(|mount| mount.point.components().count())
    }

    /// Everything that is mounted, in the order of mounting.
    pub(super) fn mounts(&self) -> Vec<Mount> {
        let text = self.text("/proc/self/mountinfo").unwrap_or_default();
        text.lines().filter_map(Mount::parse).collect()
    }

    /// The path below the root.
    pub(super) fn real(&self, path: &Path) -> PathBuf {
        let inner = path.components().filter(|part| !matches!(part, Component::RootDir));
        self.root.join(inner.collect::<PathBuf>())
    }
}

/// A line of /proc/self/mountinfo. (proc_pid_mountinfo(5))
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mount {
    pub(super) point: PathBuf,
    pub(super) kind: String,
    /// A device, usually.
    pub(super) source: String,
    /// Of the mount and of the file system.
    pub(super) options: Vec<String>,
}

impl Mount {
    fn parse(line: &str) -> Option<Self> {
        // id, parent, major:minor, root, point, options, any number of fields, "-", kind, source,
        // options of the file system.
        let (front, back) = line.split_once(" - ")?;
        let front: Vec<&str> = front.split(' ').collect();
        let back: Vec<&str> = back.split(' ').collect();
        let (own, inner) = (front.get(5)?, back.get(2)?);
        Some(Self {
            point: unescaped(front.get(4)?).into(),
            kind: (*back.first()?).to_owned(),
            source: unescaped(back.get(1)?),
            options: own.split(',').chain(inner.split(',')).map(str::to_owned).collect(),
        })
    }

    pub(super) fn has(&self, option: &str) -> bool {
        self.options.iter().any(|other| other == option)
    }
}

/// Undoes the octal escapes of white space and backslash in paths of mounts.
fn unescaped(text: &str) -> String {
    let escapes = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")];
    escapes.iter().fold(text.to_owned(), |text, (escape, plain)| text.replace(escape, plain))
}

/// Made-up systems for tests.
#[cfg(test)]
pub(super) mod fake {
    use std::sync::atomic::AtomicUsize;
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::cli::doctor::finding::Finding;
    use crate::cli::doctor::finding::Verdict;
    use crate::node::config::Overrides;

    /// A directory with the files of a system; removed in the end.
    pub(crate) struct System(PathBuf);

    impl System {
        /// A system of these files: path, and content.
        pub(crate) fn new(files: &[(&str, &str)]) -> Self {
            static COUNT: AtomicUsize = AtomicUsize::new(0);
            let count = COUNT.fetch_add(1, Ordering::Relaxed);
            let name = format!("weft-doctor-{}-{count}", std::process::id());
            let system = Self(std::env::temp_dir().join(name));
            fs::create_dir_all(&system.0).expect("created");
            for (path, content) in files {
                let path = system.path(path);
                fs::create_dir_all(path.parent().expect("below the root")).expect("created");
                fs::write(path, content).expect("written");
            }
            system
        }

        /// Adds a symbolic link.
        pub(crate) fn link(self, path: &str, target: &str) -> Self {
            let path = self.path(path);
            fs::create_dir_all(path.parent().expect("below the root")).expect("created");
            std::os::unix::fs::symlink(target, path).expect("linked");
            self
        }

        pub(crate) fn path(&self, path: &str) -> PathBuf {
            self.0.join(path.trim_start_matches('/'))
        }

        /// What `check` says of it, knowing what was asked.
        pub(crate) fn says(&self, check: fn(&Facts) -> Vec<Finding>, asked: Asked) -> Vec<Finding> {
            check(&Facts::new(&self.0, asked))
        }

        /// The verdict of the only finding of `check`.
        pub(crate) fn verdict(&self, check: fn(&Facts) -> Vec<Finding>, asked: Asked) -> Verdict {
            let found = self.says(check, asked);
            assert_eq!(found.len(), 1, "{found:#?}");
            found[0].verdict
        }
    }

    impl Drop for System {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    /// A valid configuration, and nothing else.
    pub(crate) fn configured(text: &str) -> Asked {
        let config = Config::parse(text, Overrides::default()).expect("valid");
        Asked { config: Some(Ok(config)), processors: 8, ..Asked::default() }
    }

    /// A file that is a device of 4 GiB, of which one is used, on disk 8:0 with 100 GiB free.
    pub(crate) fn device(path: &str) -> DeviceFacts {
        DeviceFacts {
            path: path.into(),
            kind: Kind::File { length: 4 << 30, allocated: 1 << 30 },
            opened: Opened::Yes { length: 4 << 30, direct: true },
            disk: (8, 0),
            free_bytes: Some(100 << 30),
        }
    }

    #[test]
    fn packages_are_installed_as_the_distribution_does_it() {
        let install = |text| {
            let system = System::new(&[("/etc/os-release", text)]);
            Facts::new(&system.0, Asked::default()).install(("nbd-client", "nbd"))
        };
        assert_eq!(install("ID=debian\n"), "apt-get install nbd-client");
        assert_eq!(install("ID=ubuntu\nID_LIKE=debian\n"), "apt-get install nbd-client");
        assert_eq!(install("ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"\n"), "dnf install nbd");
        assert_eq!(install("ID=\"sles\"\nID_LIKE=\"suse\"\n"), "zypper install nbd");
    }

    #[test]
    fn mounts_are_read_with_their_escapes_and_the_innermost_wins() {
        let system = System::new(&[(
            "/proc/self/mountinfo",
            "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,nobarrier\n\
             23 22 8:17 / /srv/my\\040data rw - xfs /dev/sdb1 rw\n",
        )]);
        let facts = Facts::new(&system.0, Asked::default());
        let mount = facts.mount_of(Path::new("/srv/my data/devices")).expect("mounted");
        assert_eq!((mount.kind.as_str(), mount.source.as_str()), ("xfs", "/dev/sdb1"));
        let mount = facts.mount_of(Path::new("/srv/my")).expect("mounted");
        assert!(mount.has("nobarrier") && mount.kind == "ext4", "{mount:?}");
    }
}
