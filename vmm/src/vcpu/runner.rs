//! The threads of the virtual CPUs: each runs its guest code, hands accesses to the buses, and stands when asked to.
//!
//! To stop a thread that is in the guest, it gets a signal whose handler sets `immediate_exit` in the page that it
//! shares with KVM (api.rst, `kvm_run`). So a signal that comes just before KVM_RUN is not lost either, and KVM_RUN
//! finishes the access that it had handed out before it returns: a virtual CPU that stands is whole.

use std::cell::Cell;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use kvm_ioctls::{VcpuExit, VcpuFd};

use super::{ExitCounts, ExitKind, VcpuState, failure};
use crate::bus::Bus;
use crate::control::protocol::Cause;
use crate::vm::VmError;

/// The guest's two address spaces of devices.
#[derive(Debug, Default)]
pub struct Buses {
    /// Ports.
    pub ports: Bus,
    /// Registers in memory.
    pub mmio: Bus,
}

/// Told once when the guest has come to an end of its own. It must not block.
pub type Report = Arc<dyn Fn(Cause) + Send + Sync>;

/// The virtual CPUs of a VM.
pub struct Vcpus {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    buses: Buses,
    counts: ExitCounts,
    report: Report,
    order: Mutex<Order>,
    changed: Condvar,
    /// Each is locked by its thread while it is in the guest.
    vcpus: Vec<Mutex<VcpuFd>>,
}

#[derive(Debug)]
struct Order {
    wanted: Wanted,
    /// Threads that stand.
    standing: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Stand,
    Run,
    End,
}

/// What becomes of a thread after an exit.
enum Next {
    Enter,
    Look,
    Ended(Cause),
}

impl Vcpus {
    /// Makes a thread for each virtual CPU; they stand until [`Vcpus::resume`]. Each calls `begin` first, which is where
    /// it gets its system call filter.
    pub fn spawn(
        vcpus: Vec<VcpuFd>,
        buses: Buses,
        report: Report,
        begin: impl Fn() + Clone + Send + 'static,
    ) -> io::Result<Self> {
        install_kick_handler()?;
        let shared = Arc::new(Shared {
            buses,
            counts: ExitCounts::default(),
            report,
            order: Mutex::new(Order { wanted: Wanted::Stand, standing: 0 }),
            changed: Condvar::new(),
            vcpus: vcpus.into_iter().map(Mutex::new).collect(),
        });
        let mut all = Self { shared: Arc::clone(&shared), threads: Vec::new() };
        for index in 0..shared.vcpus.len() {
            let (shared, begin) = (Arc::clone(&shared), begin.clone());
            let builder = std::thread::Builder::new().name(format!("vcpu{index}")).stack_size(256 << 10);
            all.threads.push(builder.spawn(move || {
                begin();
                shared.run(index);
            })?);
        }
        drop(all.shared.wait_standing(all.threads.len()));
        Ok(all)
    }

    /// Stops all; returns when they stand.
    pub fn pause(&self) {
        self.order(Wanted::Stand);
        drop(self.shared.wait_standing(self.threads.len()));
    }

    /// Lets all go on. The guest's watchdogs are told that it stood.
    pub fn resume(&self) {
        if lock(&self.shared.order).wanted == Wanted::Run {
            return;
        }
        for vcpu in &self.shared.vcpus {
            // Refused where the guest has no KVM clock, which then needs no word.
            let _ = lock(vcpu).kvmclock_ctrl();
        }
        self.order(Wanted::Run);
    }

    /// The state of all; they must stand. `known` are the registers that [`super::msrs::known`] gave.
    pub fn save(&self, known: &[u32]) -> Result<Vec<VcpuState>, VmError> {
        self.shared.vcpus.iter().map(|vcpu| VcpuState::save(&lock(vcpu), known)).collect()
    }

    /// Exits so far.
    pub fn exits(&self) -> &ExitCounts {
        &self.shared.counts
    }

    fn order(&self, wanted: Wanted) {
        lock(&self.shared.order).wanted = wanted;
        self.shared.changed.notify_all();
        if wanted != Wanted::Run {
            for thread in &self.threads {
                // SAFETY: the thread was not joined, so its id is valid; the signal has a handler.
                unsafe { libc::pthread_kill(thread.as_pthread_t(), kick_signal()) };
            }
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.order(Wanted::End);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl std::fmt::Debug for Vcpus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vcpus").field("threads", &self.threads.len()).finish_non_exhaustive()
    }
}

impl Shared {
    fn run(&self, index: usize) {
        let vcpu = &self.vcpus[index];
        IMMEDIATE_EXIT.set(&raw mut lock(vcpu).get_kvm_run().immediate_exit);
        while self.wait_for_run() {
            let mut vcpu = lock(vcpu);
            let cause = loop {
                match self.enter(&mut vcpu) {
                    Next::Enter => {}
                    Next::Look => break None,
                    Next::Ended(cause) => break Some(cause),
                }
            };
            drop(vcpu);
            if let Some(cause) = cause {
                (self.report)(cause);
                // It cannot go on; it stands until the process ends.
                lock(&self.order).wanted = Wanted::Stand;
            }
        }
        // The page goes with the vCPU; nothing must write to it then.
        IMMEDIATE_EXIT.set(std::ptr::null_mut());
    }

    /// Stands while that is wanted; false if the thread is to end.
    fn wait_for_run(&self) -> bool {
        let mut order = lock(&self.order);
        if order.wanted == Wanted::Stand {
            order.standing += 1;
            self.changed.notify_all();
            order = self
                .changed
                .wait_while(order, |order| order.wanted == Wanted::Stand)
                .unwrap_or_else(PoisonError::into_inner);
            order.standing -= 1;
        }
        order.wanted == Wanted::Run
    }

    fn wait_standing(&self, count: usize) -> MutexGuard<'_, Order> {
        let order = lock(&self.order);
        self.changed
            .wait_while(order, |order| order.standing < count && order.wanted == Wanted::Stand)
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, vcpu: &mut VcpuFd) -> Next {
        let count = |kind| self.counts.count(kind);
        match vcpu.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                count(ExitKind::PortIn);
                self.buses.ports.read(port.into(), data);
                Next::Enter
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                count(ExitKind::PortOut);
                self.buses.ports.write(port.into(), data);
                Next::Enter
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                count(ExitKind::MmioRead);
                self.buses.mmio.read(address, data);
                Next::Enter
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                count(ExitKind::MmioWrite);
                self.buses.mmio.write(address, data);
                Next::Enter
            }
            Ok(VcpuExit::Intr) => self.interrupted(vcpu),
            Err(error) if error.errno() == libc::EINTR => self.interrupted(vcpu),
            Err(error) if error.errno() == libc::EAGAIN => Next::Enter,
            Ok(VcpuExit::Shutdown) => Next::Ended(Cause::TripleFault),
            Ok(VcpuExit::SystemEvent(kind, _)) => Next::Ended(system_event(kind)),
            Ok(VcpuExit::InternalError) => failed(&failure::internal_error(vcpu)),
            Ok(exit) => {
                let what = format!("KVM came back with {exit:?}, which this monitor does not expect");
                failed(&what)
            }
            Err(error) => failed(&format!("KVM_RUN failed: {error}")),
        }
    }

    fn interrupted(&self, vcpu: &mut VcpuFd) -> Next {
        self.counts.count(ExitKind::Interrupted);
        vcpu.set_kvm_immediate_exit(0);
        Next::Look
    }
}

fn failed(what: &str) -> Next {
    eprintln!("catalyst-vmm: {what}");
    Next::Ended(Cause::Failure)
}

/// KVM_EXIT_SYSTEM_EVENT (api.rst): shutdown, reset, crash.
fn system_event(kind: u32) -> Cause {
    match kind {
        1 => Cause::PowerOff,
        2 => Cause::Reset,
        _ => Cause::TripleFault,
    }
}

thread_local! {
    /// Where this thread's virtual CPU has its `immediate_exit`. Without a destructor, so that a signal handler may
    /// look at any time.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(std::ptr::null_mut()) };
}

fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn kicked(_: libc::c_int) {
    let immediate_exit = IMMEDIATE_EXIT.get();
    if !immediate_exit.is_null() {
        // SAFETY: the thread set it to a byte of the page that its vCPU shares with KVM, and takes it back before that
        // page goes. The kernel and this thread are the only others that look at the byte.
        unsafe { immediate_exit.write_volatile(1) };
    }
}

fn install_kick_handler() -> io::Result<()> {
    // SAFETY: the structure is plain data for which zeros are right; the handler only writes a byte.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = kicked as *const () as usize;
        // No SA_RESTART: KVM_RUN is to come back.
        if libc::sigaction(kick_signal(), &raw const action, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
