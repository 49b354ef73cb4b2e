use super::*;
use guest::Program;
use std::fs::OpenOptions;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// `/dev/kvm` where it opens; elsewhere the test is skipped, aloud.
fn device() -> Option<CString> {
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => Some(c"/dev/kvm".to_owned()),
        Err(error) => {
            eprintln!("SKIPPED: /dev/kvm does not open here: {error}");
            None
        }
    }
}

#[test]
fn a_missing_device_is_absent() {
    let report = run_on(Path::new("/dev/there-is-no-kvm"));
    assert_eq!((report.device, report.verdict), (Device::Missing, Verdict::Absent));
}

#[test]
fn another_device_is_not_taken_for_kvm() {
    let report = run_on(Path::new("/dev/null"));
    assert!(matches!(report.verdict, Verdict::Unusable { .. }), "{report:?}");
    assert!(report.summary.contains("API version"), "{}", report.summary);
}

#[test]
fn the_whole_probe_keeps_its_time_and_measures() {
    let _alone = alone();
    if device().is_none() {
        return;
    }
    let begin = Instant::now();
    let report = run();
    let took = begin.elapsed();
    eprintln!("{took:?}: {report}");
    assert_eq!((report.device.clone(), report.api_version), (Device::Opened, Some(KVM_API_VERSION)));
    // On a busy machine it may have run out of time, and must say so.
    assert!(
        report.out_of_time || report.instructions_per_second.is_some_and(|rate| rate > 10_000),
        "{report:?}"
    );
    assert_eq!(report.checks.len(), checks::ALL.len());
    // The limits, and what a loaded machine may take to give the processor back.
    assert!(took < SET_UP + GUEST_CODE + Duration::from_millis(300), "took {took:?}");
}

/// Far longer than any step takes, on whatever machine.
const LONG: Duration = Duration::from_secs(20);

/// One test at a time has a guest: several at once take each other's time.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A prober with a guest and with time enough, where the device opens.
fn prober() -> Option<Prober> {
    let device = device()?;
    let mut prober = Prober { worker: Worker::start().unwrap(), deadline: Instant::now() + 5 * LONG };
    let version = prober.step(LONG, move |state| open(&device, state)).unwrap();
    assert_eq!(version, Ok(KVM_API_VERSION));
    prober.make_guest(LONG).unwrap();
    Some(prober)
}

/// `eb fe`: a jump to itself.
fn never_ends(guest: &mut Guest) -> Result<(), RunError> {
    guest.load(&Program { code: &[0xeb, 0xfe], breakpoint_handler: &[] })?;
    guest.run_to(guest::PORT_DONE)
}

#[test]
fn a_program_that_never_ends_is_stopped_by_the_signal_and_the_next_one_runs() {
    let _alone = alone();
    let Some(mut prober) = prober() else { return };
    let begin = Instant::now();
    let result = prober.run(ONE_INSTRUCTION, never_ends);
    let took = begin.elapsed();
    assert!(
        matches!(result, Err(StepError::Run(RunError::Interrupted { rip: guest::CODE, .. }))),
        "{result:?}"
    );
    assert!(took >= ONE_INSTRUCTION && took < ONE_INSTRUCTION + Duration::from_secs(1), "took {took:?}");
    assert!(prober.run(LONG, speed::measure).is_ok_and(|rate| rate > 10_000));
}

#[test]
fn a_measurement_that_is_cut_short_has_a_figure() {
    let _alone = alone();
    let Some(mut prober) = prober() else { return };
    // Ten minutes at two billion instructions a second.
    let endless = |guest: &mut Guest| speed::measure_from(1 << 39, guest);
    let rate = prober.run(Duration::from_millis(500), endless).unwrap();
    assert!(rate > 10_000, "{rate}");
}

/// `0f 0b`: an undefined instruction, with no handler for #UD: a triple fault.
fn faults(guest: &mut Guest) -> Result<(), RunError> {
    guest.load(&Program { code: &[0x0f, 0x0b], breakpoint_handler: &[] })?;
    guest.run_to(guest::PORT_DONE)
}

#[test]
fn a_program_that_faults_is_reported_with_its_exit_and_the_next_one_runs() {
    let _alone = alone();
    let Some(mut prober) = prober() else { return };
    let result = prober.run(LONG, faults);
    assert!(
        matches!(result, Err(StepError::Run(RunError::Exit { .. } | RunError::NotEmulated { .. }))),
        "{result:?}"
    );
    assert!(prober.run(LONG, speed::measure).is_ok_and(|rate| rate > 10_000));
}

/// mov ebx, 7; out; hlt.
fn plain(guest: &mut Guest) -> Result<u64, RunError> {
    guest.load(&Program { code: &[0xbb, 7, 0, 0, 0, 0xe6, 0xe1, 0xf4], breakpoint_handler: &[] })?;
    guest.run_to(guest::PORT_DONE)?;
    Ok(guest.registers()?.rbx)
}

#[test]
fn a_program_s_registers_are_read_back() {
    let _alone = alone();
    let Some(mut prober) = prober() else { return };
    assert_eq!(prober.run(LONG, plain).unwrap(), 7);
}

#[test]
fn without_time_nothing_is_run() {
    let mut prober = Prober::start().unwrap();
    prober.deadline = Instant::now();
    assert!(matches!(prober.run(ONE_INSTRUCTION, never_ends), Err(StepError::NoTime)));
}
