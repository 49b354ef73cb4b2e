//! The speed of a kernel-mode loop between two port exits.

use std::time::{Duration, Instant};

use super::guest::{DATA, Guest, PORT_DONE, PORT_READY, Program, RunError};

/// Announces itself, counts down from the number at [`DATA`], announces its end, and begins again.
///
/// ```text
/// again: e6 e0        out  0xe0, al
///        48 8b 0f     mov  rcx, [rdi]
/// loop:  48 ff c9     dec  rcx
///        75 fb        jnz  loop
///        e6 e1        out  0xe1, al
///        eb f2        jmp  again
/// ```
const LOOP: Program = Program {
    code: &[0xe6, 0xe0, 0x48, 0x8b, 0x0f, 0x48, 0xff, 0xc9, 0x75, 0xfb, 0xe6, 0xe1, 0xeb, 0xf2],
    breakpoint_handler: &[],
};
/// Instructions in one turn of the loop.
const PER_TURN: u64 = 2;
/// Turns of the first round: about 12 ms where the kernel interprets them, a blink where it does not.
const FIRST_TURNS: u64 = 10_000;
/// Turns of the longest round: 10 ms at half a billion instructions a second.
const MOST_TURNS: u64 = 2_500_000;
const GROWTH: u64 = 5;
/// A round that takes as long as this says enough: the exit at its end no longer weighs.
const LONG_ENOUGH: Duration = Duration::from_millis(5);
/// Rounds at the full length; the best counts, since other work on the machine only ever takes time away.
const ROUNDS: u32 = 3;

/// Measures kernel-mode instructions per second: the best round, for a short one only ever says too little.
///
/// A guest that is stopped at its deadline has been measured too, if it had begun to count.
pub(super) fn measure(guest: &mut Guest) -> Result<u64, RunError> {
    measure_from(FIRST_TURNS, guest)
}

/// The same with a first round of so many `turns`.
pub(super) fn measure_from(mut turns: u64, guest: &mut Guest) -> Result<u64, RunError> {
    guest.load(&LOOP)?;
    let mut best = 0;
    let mut rounds = 0;
    while rounds < ROUNDS {
        guest.write(DATA, &turns.to_le_bytes())?;
        match guest.run_to(PORT_READY) {
            Err(RunError::Interrupted { .. }) if best > 0 => return Ok(best),
            result => result?,
        }
        let begin = Instant::now();
        let result = guest.run_to(PORT_DONE);
        let took = begin.elapsed();
        best = best.max(rate((turns - turns_left(guest, &result, turns)?) * PER_TURN, took));
        match result {
            Err(RunError::Interrupted { .. }) if best > 0 => return Ok(best),
            result => result?,
        }
        if took < LONG_ENOUGH && turns < MOST_TURNS {
            turns = (turns * GROWTH).min(MOST_TURNS);
        } else {
            rounds += 1;
        }
    }
    Ok(best)
}

/// How much of a round of so many `turns` was not done.
fn turns_left(guest: &Guest, result: &Result<(), RunError>, turns: u64) -> Result<u64, RunError> {
    match result {
        Ok(()) => Ok(0),
        // Zero before the count was loaded: then nothing at all was done.
        Err(_) => match guest.registers()?.rcx {
            0 => Ok(turns),
            left => Ok(left.min(turns)),
        },
    }
}

/// Instructions per second.
fn rate(instructions: u64, took: Duration) -> u64 {
    let nanoseconds = took.as_nanos().max(1);
    u64::try_from(u128::from(instructions) * 1_000_000_000 / nanoseconds).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_instructions_per_second() {
        assert_eq!(rate(20_000, Duration::from_millis(10)), 2_000_000);
        assert_eq!(rate(5, Duration::ZERO), 5_000_000_000);
    }
}
