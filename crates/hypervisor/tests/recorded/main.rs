//! The drivers of monitors that cannot run everywhere, against servers that play the monitors' API documents. Whether the documents are
//! true is not shown here.

mod cloud_hypervisor;
mod document;
mod firecracker;
mod server;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use joey_hypervisor::{Boot, Hypervisor, HypervisorError, Machine, Network, Shape, Template, Vm};
use server::Stage;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const BOUND: Duration = Duration::from_secs(30);
const MEMORY: u64 = 64 << 20;
/// What a machine has in its memory when it is saved, in the middle of nothing.
const REMEMBERED: (&[u8], u64) = (b"booted", 40 << 20);

/// Files that machines are made of.
struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    /// `None`: monitors have users of their own, which only root can give files to.
    fn new() -> Option<Self> {
        if !nix::unistd::Uid::effective().is_root() {
            eprintln!("skipped: it needs root");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        for name in ["kernel", "initramfs", "netns"] {
            std::fs::write(dir.path().join(name), name).unwrap();
        }
        Some(Self { dir })
    }

    fn file(&self, name: &str, bytes: usize) -> PathBuf {
        let place = self.dir.path().join(name);
        std::fs::write(&place, vec![7; bytes]).unwrap();
        place
    }

    /// A machine with nothing, as one that becomes a template.
    fn bare(&self, name: &str) -> Machine {
        let dir = self.dir.path().join(name);
        std::fs::create_dir(&dir).unwrap();
        let (kernel, initramfs) = (self.dir.path().join("kernel"), self.dir.path().join("initramfs"));
        let shape = Shape { cpus: 2, memory_bytes: MEMORY };
        let boot = Boot { id: "guest".to_owned(), kernel, initramfs };
        Machine { to_be_saved: true, ..Machine::new(name.to_owned(), dir, "/none".to_owned(), shape, boot) }
    }

    /// One with all that an instance's has, and two layers.
    fn whole(&self, name: &str) -> Machine {
        let machine = self.bare(name);
        let disk = self.file(&format!("{name}.disk"), 1 << 20);
        let layers = [1, 2].map(|slot| (slot, vec![self.file(&format!("{name}.{slot}"), 4096 * slot as usize)]));
        let network = Network { netns: self.dir.path().join("netns"), mac: [2, 0, 10, 88, 0, 9] };
        Machine { disk: Some(disk), layers: layers.into(), network: Some(network), to_be_saved: false, ..machine }
    }
}

/// What was asked since this was asked last; nothing was asked that the document does not have.
fn heard(stage: &Stage) -> Vec<String> {
    assert_eq!(*stage.wrong.lock().unwrap(), Vec::<String>::new());
    std::mem::take(&mut *stage.heard.lock().unwrap())
}

/// The machine's inside says back what is said to it.
async fn speaks(vm: &dyn Vm) {
    let mut stream = tokio::time::timeout(BOUND, vm.connect()).await.expect("in time").unwrap();
    stream.write_all(b"PRI * HTTP/2.0").await.unwrap();
    let mut back = [0; 14];
    stream.read_exact(&mut back).await.unwrap();
    assert_eq!(&back, b"PRI * HTTP/2.0");
}

async fn ends(vm: &dyn Vm) {
    vm.kill();
    tokio::time::timeout(BOUND, vm.ended()).await.expect("it ends");
}

/// A template that was saved, stored and loaded again.
async fn template(hypervisor: &dyn Hypervisor, bench: &Bench) -> Arc<Template> {
    let vm = hypervisor.start(bench.bare("template")).await.unwrap();
    speaks(&*vm).await;
    let template = hypervisor.save(&*vm).await.unwrap();
    ends(&*vm).await;
    let place = bench.dir.path().join("stored");
    template.store(&place, "key").unwrap();
    Arc::new(Template::load(&place, "key").unwrap().expect("it is whole"))
}

/// Whether the memory that a copy is to have is the saved one, and sealed.
fn is_remembered(place: &Path) -> Result<(), String> {
    use std::os::unix::fs::FileExt;
    let open = std::fs::File::options().read(true).write(true).open(place).map_err(|error| error.to_string())?;
    let (words, at) = REMEMBERED;
    let mut found = vec![0; words.len()];
    open.read_exact_at(&mut found, at).map_err(|error| error.to_string())?;
    match found == words && open.metadata().is_ok_and(|found| found.len() == MEMORY) {
        true if open.write_all_at(b"x", 0).is_ok() => Err("the memory can be written".to_owned()),
        true => Ok(()),
        false => Err("the memory is not the saved one".to_owned()),
    }
}

/// The error of a machine that does not start, and that none of its files is open any more to say so.
async fn fails(hypervisor: &dyn Hypervisor, machine: Machine) -> HypervisorError {
    match tokio::time::timeout(BOUND, hypervisor.start(machine)).await.expect("in time") {
        Ok(_) => panic!("it starts"),
        Err(error) => error,
    }
}

/// The error where this request has no answer: the clock is let run ahead once the request is there.
async fn hangs(hypervisor: &dyn Hypervisor, machine: Machine, reached: &tokio::sync::Notify) -> HypervisorError {
    let ahead = async {
        reached.notified().await;
        tokio::time::pause();
    };
    let (started, ()) = tokio::join!(hypervisor.start(machine), ahead);
    tokio::time::resume();
    started.err().expect("it does not start")
}

fn contents(path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    std::fs::File::open(path).unwrap().read_to_end(&mut bytes).unwrap();
    bytes
}
