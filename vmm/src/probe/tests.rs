use super::*;
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
    // The budget, and what a loaded machine may take to give the processor back.
    assert!(took < BUDGET + Duration::from_millis(100), "took {took:?}");
}

/// `eb fe`: a jump to itself.
fn never_ends(kvm: &Kvm) -> Result<(), RunError> {
    guest::Guest::new(kvm, &[0xeb, 0xfe], &[])?.run_to(guest::PORT_DONE)
}

#[test]
fn a_guest_that_never_ends_is_stopped_by_the_signal() {
    let Some(path) = device() else { return };
    let begin = Instant::now();
    let result = guest_run(&path, begin + ONE_GUEST, never_ends);
    let took = begin.elapsed();
    assert!(
        matches!(result, Err(GuestError::Run(RunError::Interrupted { rip: guest::CODE, .. }))),
        "{result:?}"
    );
    assert!(took >= ONE_GUEST && took < BUDGET, "took {took:?}");
}

/// `0f 0b`: an undefined instruction, with no handler for #UD: a triple fault.
fn faults(kvm: &Kvm) -> Result<(), RunError> {
    guest::Guest::new(kvm, &[0x0f, 0x0b], &[])?.run_to(guest::PORT_DONE)
}

#[test]
fn a_guest_that_faults_is_reported_with_its_exit() {
    let Some(path) = device() else { return };
    let result = guest_run(&path, Instant::now() + BUDGET, faults);
    let Err(GuestError::Run(RunError::Exit { .. } | RunError::NotEmulated { .. })) = result else {
        panic!("{result:?}")
    };
}

#[test]
fn without_time_nothing_is_run() {
    let result = guest_run(c"/dev/kvm", Instant::now(), never_ends);
    assert!(matches!(result, Err(GuestError::NoTime)), "{result:?}");
}
