use super::*;
use guest::Program;
use std::fs::OpenOptions;

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
    if device().is_none() {
        return;
    }
    let begin = Instant::now();
    let report = run();
    let took = begin.elapsed();
    eprintln!("{took:?}: {report}");
    assert_eq!((report.device.clone(), report.api_version), (Device::Opened, Some(KVM_API_VERSION)));
    assert!(report.instructions_per_second.is_some_and(|rate| rate > 10_000), "{report:?}");
    assert_eq!(report.checks.len(), checks::ALL.len());
    // The limits, and what a loaded machine may take to give the processor back.
    assert!(took < SET_UP + GUEST_CODE + Duration::from_millis(300), "took {took:?}");
}

/// A prober with a guest, where the device opens.
fn prober() -> Option<Prober> {
    let mut prober = Prober::start().unwrap();
    assert_eq!(prober.open(device()?).unwrap(), Ok(KVM_API_VERSION));
    prober.make_guest().unwrap();
    // However long that took: each test has its own idea of the time.
    prober.deadline = Instant::now() + Duration::from_secs(10);
    Some(prober)
}

/// `eb fe`: a jump to itself.
fn never_ends(guest: &mut Guest) -> Result<(), RunError> {
    guest.load(&Program { code: &[0xeb, 0xfe], breakpoint_handler: &[] })?;
    guest.run_to(guest::PORT_DONE)
}

#[test]
fn a_program_that_never_ends_is_stopped_by_the_signal_and_the_next_one_runs() {
    let Some(mut prober) = prober() else { return };
    let begin = Instant::now();
    let result = prober.run(never_ends);
    let took = begin.elapsed();
    assert!(
        matches!(result, Err(StepError::Run(RunError::Interrupted { rip: guest::CODE, .. }))),
        "{result:?}"
    );
    assert!(took >= ONE_PROGRAM && took < ONE_PROGRAM + Duration::from_secs(1), "took {took:?}");
    assert!(prober.run(speed::measure).is_ok_and(|rate| rate > 10_000));
}

/// `0f 0b`: an undefined instruction, with no handler for #UD: a triple fault.
fn faults(guest: &mut Guest) -> Result<(), RunError> {
    guest.load(&Program { code: &[0x0f, 0x0b], breakpoint_handler: &[] })?;
    guest.run_to(guest::PORT_DONE)
}

#[test]
fn a_program_that_faults_is_reported_with_its_exit_and_the_next_one_runs() {
    let Some(mut prober) = prober() else { return };
    let result = prober.run(faults);
    assert!(
        matches!(result, Err(StepError::Run(RunError::Exit { .. } | RunError::NotEmulated { .. }))),
        "{result:?}"
    );
    assert!(prober.run(speed::measure).is_ok_and(|rate| rate > 10_000));
}

/// mov ebx, 7; out; hlt.
fn plain(guest: &mut Guest) -> Result<u64, RunError> {
    guest.load(&Program { code: &[0xbb, 7, 0, 0, 0, 0xe6, 0xe1, 0xf4], breakpoint_handler: &[] })?;
    guest.run_to(guest::PORT_DONE)?;
    Ok(guest.registers()?.rbx)
}

#[test]
fn a_program_s_registers_are_read_back() {
    let Some(mut prober) = prober() else { return };
    assert_eq!(prober.run(plain).unwrap(), 7);
}

#[test]
fn without_time_nothing_is_run() {
    let mut prober = Prober::start().unwrap();
    prober.deadline = Instant::now();
    assert!(matches!(prober.run(never_ends), Err(StepError::NoTime)));
}
