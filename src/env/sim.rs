//! The simulator's environment: one thread, virtual time, a seeded scheduler.
//!
//! [`SimEnv::run`] polls its main future and every spawned task on the calling thread. The next
//! ready task is drawn from the seeded generator; virtual time stands still while any task is
//! ready and then jumps to the next timer. So one seed is one run, bit for bit, which
//! [`SimEnv::trace_hash`] lets a test check.
//!
//! A *process* ([`SimEnv::process`]) is a set of tasks that die together: [`SimEnv::halt`] drops
//! them between two polls, as `kill -9` would. Disks outlive it (`device/sim.rs`).
//!
//! # Invariants
//! * Futures are not `Send`, the environment is: they lie in a thread-local table keyed by world
//!   and task, and only the thread that created the world may spawn or run.
//! * No lock is held while a future is polled or dropped.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::Weak;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::task::Context;
use std::task::Poll;
use std::task::Wake;
use std::task::Waker;
use std::thread::ThreadId;
use std::time::Duration;

use parking_lot::Mutex;

use crate::env::Clock;
use crate::env::LocalBoxFuture;
use crate::env::Rng;
use crate::env::Spawn;

/// Polls without virtual time moving after which a run counts as stuck in a loop. Arbitrary, far
/// above what any real instant needs.
const POLLS_PER_INSTANT_MAX: u64 = 5_000_000;

/// Wall clock at virtual time zero: 2026-01-01, so that dates in reports look like dates.
const UNIX_MS_AT_START: u64 = 1_767_225_600_000;

/// The process that is the whole world: halting it halts all.
const PROCESS_ALL: u64 = 0;

/// Tells worlds apart in the thread-local table; never part of a trace.
static NEXT_WORLD: AtomicU64 = AtomicU64::new(1);

thread_local! {
    static TASKS: RefCell<BTreeMap<(u64, u64), Task>> = const { RefCell::new(BTreeMap::new()) };
}

struct Task {
    process: u64,
    future: LocalBoxFuture<()>,
    waker: Arc<TaskWaker>,
}

/// Why a run ended without its main future completing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stalled {
    /// No task is ready and no timer is set: everybody waits for somebody.
    Deadlock,
    /// The limit of virtual time passed.
    TimeLimit,
    /// Tasks kept waking each other without time moving.
    Livelock,
}

impl fmt::Display for Stalled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Deadlock => "deadlock: no task is ready and no timer is set",
            Self::TimeLimit => "the limit of virtual time passed",
            Self::Livelock => "livelock: tasks wake each other and time stands still",
        })
    }
}

/// One process of a simulated world, as an environment.
pub struct SimEnv {
    world: Arc<World>,
    process: u64,
}

struct World {
    id: u64,
    thread: ThreadId,
    running: AtomicBool,
    /// Guards everything below; held for a few instructions, never across a poll.
    state: Mutex<State>,
}

struct State {
    now: Duration,
    wall_jump_ms: u64,
    rng: Xoshiro,
    /// Chance, in a million, of a pause, and the longest.
    pauses: (u32, Duration),
    trace: u64,
    /// Tasks woken and not yet polled, each once.
    ready: Vec<Arc<TaskWaker>>,
    /// By deadline, then by order of registration.
    timers: BTreeMap<(Duration, u64), Waker>,
    /// Last number given to a task, a timer or a process.
    last_id: u64,
    /// The process whose task is being polled, and whether it was halted meanwhile.
    polling: Option<(u64, bool)>,
}

impl SimEnv {
    /// A new world, whose every choice follows from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Arc<Self> {
        let state = State {
            now: Duration::ZERO,
            wall_jump_ms: 0,
            rng: Xoshiro::new(!seed),
            pauses: (0, Duration::ZERO),
            trace: seed,
            ready: Vec::new(),
            timers: BTreeMap::new(),
            last_id: PROCESS_ALL,
            polling: None,
        };
        let world = World {
            id: NEXT_WORLD.fetch_add(1, Ordering::Relaxed),
            thread: std::thread::current().id(),
            running: AtomicBool::new(false),
            state: Mutex::new(state),
        };
        Arc::new(Self { world: Arc::new(world), process: PROCESS_ALL })
    }

    /// A new process of the same world: same clock, randomness and scheduler; its own fate.
    #[must_use]
    pub fn process(&self) -> Arc<Self> {
        let process = self.world.state.lock().new_id();
        Arc::new(Self { world: self.world.clone(), process })
    }

    /// Runs `main`, and every task spawned meanwhile, until `main` completes.
    ///
    /// Tasks that are not over then wait for the next run, or for [`SimEnv::halt`]; a world whose
    /// tasks hold its environment is freed only by the latter.
    ///
    /// # Panics
    /// If `main` can never complete; see [`Stalled`].
    pub fn run<T>(self: &Arc<Self>, main: impl Future<Output = T>) -> T {
        match self.run_for(Duration::MAX, main) {
            Ok(value) => value,
            Err(stalled) => panic!("simulation stalled at {:?}: {stalled}", self.now()),
        }
    }

    /// As [`SimEnv::run`], for at most `limit` of virtual time.
    ///
    /// # Errors
    /// [`Stalled`]; `main` was dropped.
    pub fn run_for<T>(
        self: &Arc<Self>,
        limit: Duration,
        main: impl Future<Output = T>,
    ) -> Result<T, Stalled> {
        self.world.assert_home();
        assert!(!self.world.running.swap(true, Ordering::Relaxed), "a run inside a run");
        let _running = Running(&self.world);

        let end = self.now().saturating_add(limit);
        let main_waker = self.world.new_waker();
        let waker = Waker::from(main_waker.clone());
        let mut main = std::pin::pin!(main);
        main_waker.wake_by_ref();

        let mut polls = 0;
        loop {
            let Some(next) = self.world.next_ready() else {
                self.world.advance(end)?;
                polls = 0;
                continue;
            };
            polls += 1;
            if polls > POLLS_PER_INSTANT_MAX {
                return Err(Stalled::Livelock);
            }
            if next.task != main_waker.task {
                self.world.poll_task(&next);
            } else if let Poll::Ready(value) = main.as_mut().poll(&mut Context::from_waker(&waker))
            {
                return Ok(value);
            }
        }
    }

    /// Drops all tasks of this process at once, with the timers they hold: a process crash.
    ///
    /// The environment of the whole world ([`SimEnv::new`]) halts every process. May be called
    /// from inside a run, also by a task of the process itself, which then is dropped when it
    /// yields. The environment can be used again for a restarted process.
    pub fn halt(&self) {
        self.world.assert_home();
        self.world.mix(self.process ^ 0x68_61_6c_74);
        if let Some((process, halted)) = &mut self.world.state.lock().polling {
            *halted |= self.process == PROCESS_ALL || *process == self.process;
        }
        // Dropping a future may spawn another, so look again until none is left.
        loop {
            let doomed: Vec<Task> = TASKS.with_borrow_mut(|tasks| {
                let all = (self.world.id, 0)..=(self.world.id, u64::MAX);
                tasks
                    .extract_if(all, |_, task| {
                        self.process == PROCESS_ALL || task.process == self.process
                    })
                    .map(|(_, task)| task)
                    .collect()
            });
            if doomed.is_empty() {
                return;
            }
        }
    }

    /// Tasks of this process (of all, for the world's own environment) that are not over.
    #[must_use]
    pub fn task_count(&self) -> usize {
        TASKS.with_borrow(|tasks| {
            tasks
                .range((self.world.id, 0)..=(self.world.id, u64::MAX))
                .filter(|(_, task)| self.process == PROCESS_ALL || task.process == self.process)
                .count()
        })
    }

    /// A hash of every scheduling decision and random number so far: equal for two runs of a seed.
    #[must_use]
    pub fn trace_hash(&self) -> u64 {
        self.world.state.lock().trace
    }

    /// Mixes an event of the caller's into [`SimEnv::trace_hash`].
    pub fn trace(&self, event: u64) {
        self.world.mix(event);
    }

    /// From now on [`Spawn::pause`] gives a pause of up to `longest` with a probability of `ppm` in
    /// a million.
    pub fn set_pauses(&self, ppm: u32, longest: Duration) {
        self.world.state.lock().pauses = (ppm, longest);
    }

    /// Moves the wall clock, not the monotonic one, forward.
    pub fn jump_wall_clock(&self, by: Duration) {
        let by = u64::try_from(by.as_millis()).unwrap_or(u64::MAX);
        let mut state = self.world.state.lock();
        state.wall_jump_ms = state.wall_jump_ms.saturating_add(by);
    }
}

impl Clock for SimEnv {
    fn now(&self) -> Duration {
        self.world.state.lock().now
    }

    fn unix_ms(&self) -> u64 {
        let state = self.world.state.lock();
        let passed = u64::try_from(state.now.as_millis()).unwrap_or(u64::MAX);
        UNIX_MS_AT_START.saturating_add(passed).saturating_add(state.wall_jump_ms)
    }

    fn sleep(&self, duration: Duration) -> LocalBoxFuture<()> {
        let deadline = self.now().saturating_add(duration);
        Box::pin(Sleep { world: self.world.clone(), deadline, timer: None })
    }
}

impl Rng for SimEnv {
    fn random_u64(&self) -> u64 {
        let mut state = self.world.state.lock();
        let value = state.rng.next();
        state.mix(value);
        value
    }
}

impl Spawn for SimEnv {
    fn spawn(&self, task: LocalBoxFuture<()>) {
        self.world.assert_home();
        let waker = self.world.new_waker();
        let key = (self.world.id, waker.task);
        let task = Task { process: self.process, future: task, waker: waker.clone() };
        TASKS.with_borrow_mut(|tasks| tasks.insert(key, task));
        waker.wake_by_ref();
    }

    fn pause(&self) -> Option<LocalBoxFuture<()>> {
        let (ppm, longest) = self.world.state.lock().pauses;
        if !self.chance(ppm) {
            return None;
        }
        let longest = u64::try_from(longest.as_micros()).unwrap_or(u64::MAX);
        Some(self.sleep(Duration::from_micros(self.below(longest.max(1)))))
    }
}

impl World {
    fn assert_home(&self) {
        assert_eq!(std::thread::current().id(), self.thread, "a simulated world has one thread");
    }

    fn mix(&self, value: u64) {
        self.state.lock().mix(value);
    }

    fn new_waker(self: &Arc<Self>) -> Arc<TaskWaker> {
        let task = self.state.lock().new_id();
        Arc::new(TaskWaker { world: Arc::downgrade(self), task, queued: AtomicBool::new(false) })
    }

    /// Draws the next task to poll, if any is ready.
    fn next_ready(&self) -> Option<Arc<TaskWaker>> {
        let mut state = self.state.lock();
        let count = state.ready.len();
        if count == 0 {
            return None;
        }
        let chosen = match count {
            1 => 0,
            _ => bounded(state.rng.next(), count),
        };
        let next = state.ready.swap_remove(chosen);
        state.mix(next.task);
        next.queued.store(false, Ordering::Relaxed);
        Some(next)
    }

    /// Moves time to the next timer and wakes all that are due.
    fn advance(&self, end: Duration) -> Result<(), Stalled> {
        let mut due = Vec::new();
        {
            let mut state = self.state.lock();
            let Some((&(deadline, _), _)) = state.timers.first_key_value() else {
                return Err(Stalled::Deadlock);
            };
            if deadline > end {
                state.now = end;
                return Err(Stalled::TimeLimit);
            }
            assert!(deadline >= state.now, "a timer in the past was not fired");
            state.now = deadline;
            state.mix(u64::try_from(deadline.as_nanos()).unwrap_or(u64::MAX));
            while let Some(timer) = state.timers.first_entry() {
                if timer.key().0 > deadline {
                    break;
                }
                due.push(timer.remove());
            }
        }
        due.into_iter().for_each(Waker::wake);
        Ok(())
    }

    fn poll_task(&self, waker: &Arc<TaskWaker>) {
        let key = (self.id, waker.task);
        // Woken after its end: nothing to do.
        let Some(mut task) = TASKS.with_borrow_mut(|tasks| tasks.remove(&key)) else { return };
        self.state.lock().polling = Some((task.process, false));
        let handle = Waker::from(task.waker.clone());
        let poll = task.future.as_mut().poll(&mut Context::from_waker(&handle));
        let halted = self.state.lock().polling.take().is_some_and(|(_, halted)| halted);
        if poll.is_pending() && !halted {
            TASKS.with_borrow_mut(|tasks| tasks.insert(key, task));
        }
    }
}

impl State {
    fn new_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    fn mix(&mut self, value: u64) {
        self.trace = scramble(self.trace.rotate_left(17) ^ value);
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // Tasks that held the world would have kept it: only others can be left. The table itself
        // may be gone when a thread ends.
        let left = TASKS.try_with(|tasks| {
            let mut tasks = tasks.try_borrow_mut().ok()?;
            let all = (self.id, 0)..=(self.id, u64::MAX);
            Some(tasks.extract_if(all, |_, _| true).map(|(_, task)| task).collect::<Vec<_>>())
        });
        drop(left);
    }
}

/// Clears the flag also when a poll panics.
struct Running<'a>(&'a World);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.running.store(false, Ordering::Relaxed);
        self.0.state.lock().polling = None;
    }
}

struct TaskWaker {
    /// Weak, because the world's ready list and timers hold wakers.
    world: Weak<World>,
    task: u64,
    /// Whether it is in the ready list.
    queued: AtomicBool,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let Some(world) = self.world.upgrade() else { return };
        if !self.queued.swap(true, Ordering::Relaxed) {
            world.state.lock().ready.push(self.clone());
        }
    }
}

struct Sleep {
    world: Arc<World>,
    deadline: Duration,
    timer: Option<(Duration, u64)>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        let mut state = this.world.state.lock();
        if state.now >= this.deadline {
            return Poll::Ready(());
        }
        let timer = match this.timer {
            Some(timer) => timer,
            None => (this.deadline, state.new_id()),
        };
        this.timer = Some(timer);
        let old = state.timers.insert(timer, context.waker().clone());
        drop(state);
        drop(old);
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        let old = self.timer.and_then(|timer| self.world.state.lock().timers.remove(&timer));
        drop(old);
    }
}

/// Choices drawn from any source of randomness.
pub trait Choose: Rng {
    /// A number below `limit`, which must not be zero.
    fn below(&self, limit: u64) -> u64 {
        assert!(limit > 0, "nothing to choose from");
        // The bias is below limit / 2^64.
        u64::try_from((u128::from(self.random_u64()) * u128::from(limit)) >> 64)
            .expect("a product of two u64, shifted by 64, fits one")
    }

    /// True with a probability of `ppm` in a million. Draws nothing if `ppm` is zero.
    fn chance(&self, ppm: u32) -> bool {
        ppm > 0 && self.below(1_000_000) < u64::from(ppm)
    }
}

impl<T: Rng + ?Sized> Choose for T {}

/// A generator of its own, for workloads and models beside a world.
pub struct SeededRng(Mutex<Xoshiro>);

impl SeededRng {
    /// A generator whose numbers follow from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(Mutex::new(Xoshiro::new(seed)))
    }
}

impl Rng for SeededRng {
    fn random_u64(&self) -> u64 {
        self.0.lock().next()
    }
}

/// xoshiro256++ by Blackman and Vigna, seeded through splitmix64 as they advise.
struct Xoshiro([u64; 4]);

impl Xoshiro {
    fn new(seed: u64) -> Self {
        let step = |n: u64| scramble(seed.wrapping_add(GOLDEN.wrapping_mul(n)));
        Self([step(1), step(2), step(3), step(4)])
    }

    fn next(&mut self) -> u64 {
        let [a, b, c, d] = &mut self.0;
        let value = a.wrapping_add(*d).rotate_left(23).wrapping_add(*a);
        let shifted = *b << 17;
        *c ^= *a;
        *d ^= *b;
        *b ^= *c;
        *a ^= *d;
        *c ^= shifted;
        *d = d.rotate_left(45);
        value
    }
}

/// 2^64 divided by the golden ratio: splitmix64's increment.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// The output function of splitmix64.
fn scramble(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

fn bounded(random: u64, limit: usize) -> usize {
    usize::try_from((u128::from(random) * limit as u128) >> 64).expect("below limit, a usize")
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::rc::Rc;

    use tokio::sync::oneshot;

    /// Ten tasks, three naps each; returns the order in which naps ended.
    fn naps(seed: u64) -> (Vec<u64>, u64, Duration) {
        let env = SimEnv::new(seed);
        let order = Rc::new(RefCell::new(Vec::new()));
        let result = env.run(async {
            for task in 0..10 {
                let (env2, order) = (env.clone(), order.clone());
                env.spawn(Box::pin(async move {
                    for _ in 0..3 {
                        env2.sleep(Duration::from_millis(env2.below(4))).await;
                        order.borrow_mut().push(task);
                    }
                }));
            }
            env.sleep(Duration::from_hours(1)).await;
            order.borrow().clone()
        });
        assert_eq!(env.task_count(), 0);
        (result, env.trace_hash(), env.now())
    }

    #[test]
    fn one_seed_is_one_run_and_another_seed_is_another() {
        assert_eq!(naps(7), naps(7));
        assert_ne!(naps(7).0, naps(8).0);
        assert_ne!(naps(7).1, naps(8).1);
    }

    #[test]
    fn seed_decides_which_ready_task_goes_first() {
        let first = |seed| {
            let env = SimEnv::new(seed);
            let order = Rc::new(RefCell::new(Vec::new()));
            for task in 0..4 {
                let order = order.clone();
                env.spawn(Box::pin(async move { order.borrow_mut().push(task) }));
            }
            env.run(env.sleep(Duration::from_millis(1)));
            order.borrow()[0]
        };
        let mut seen: Vec<i32> = (0..50).map(first).collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen, [0, 1, 2, 3]);
    }

    #[test]
    fn time_jumps_to_the_next_timer_and_no_further() {
        let (order, _, end) = naps(1);
        assert_eq!(order.len(), 30);
        assert_eq!(end, Duration::from_hours(1));
    }

    #[test]
    fn waiting_for_nothing_is_reported_as_deadlock() {
        let env = SimEnv::new(1);
        let (_sender, receiver) = oneshot::channel::<()>();
        assert_eq!(env.run_for(Duration::MAX, receiver).map(|_| ()), Err(Stalled::Deadlock));
    }

    #[test]
    fn time_limit_ends_a_run_and_the_clock_stands_at_it() {
        let env = SimEnv::new(1);
        let limit = Duration::from_secs(5);
        assert_eq!(env.run_for(limit, env.sleep(limit * 2)), Err(Stalled::TimeLimit));
        assert_eq!(env.now(), limit);
        env.run(env.sleep(limit));
        assert_eq!(env.now(), limit * 2);
    }

    #[test]
    fn halting_a_process_drops_its_tasks_and_timers_and_no_others() {
        let env = SimEnv::new(3);
        let alive = Rc::new(());
        let (victim, witness) = (env.process(), env.process());
        for process in [&victim, &victim, &witness] {
            let (process2, alive) = (process.clone(), alive.clone());
            process.spawn(Box::pin(async move {
                process2.sleep(Duration::from_secs(10)).await;
                drop(alive);
            }));
        }
        env.run(async {
            env.sleep(Duration::from_secs(1)).await;
            assert_eq!(Rc::strong_count(&alive), 4);
            victim.halt();
            assert_eq!(Rc::strong_count(&alive), 2);
            assert_eq!((victim.task_count(), witness.task_count()), (0, 1));
            env.sleep(Duration::from_secs(20)).await;
        });
        assert_eq!(Rc::strong_count(&alive), 1);
        assert!(env.world.state.lock().timers.is_empty());
    }

    #[test]
    fn task_may_halt_its_own_process_and_the_process_may_start_again() {
        let env = SimEnv::new(4);
        let process = env.process();
        let reached = Rc::new(RefCell::new(0));
        for _ in 0..2 {
            let (inner, reached) = (process.clone(), reached.clone());
            process.spawn(Box::pin(async move {
                *reached.borrow_mut() += 1;
                inner.halt();
                inner.sleep(Duration::from_secs(1)).await;
                *reached.borrow_mut() += 100;
            }));
            env.run(env.sleep(Duration::from_secs(5)));
            assert_eq!(process.task_count(), 0);
        }
        assert_eq!(*reached.borrow(), 2);
    }

    #[test]
    fn environment_can_be_passed_as_env_ref() {
        let env = SimEnv::new(5);
        let env_ref: crate::env::EnvRef = env.clone();
        let limit = Duration::from_millis(3);
        let late = crate::env::timeout(&env_ref, limit, env_ref.sleep(limit * 2));
        assert_eq!(env.run(late), None);
        let early = crate::env::timeout(&env_ref, limit * 2, env_ref.sleep(limit));
        assert_eq!(env.run(early), Some(()));
    }

    #[test]
    fn draws_are_spread_over_the_whole_range() {
        let rng = SeededRng::new(11);
        let mut seen = [0; 8];
        for _ in 0..8_000 {
            seen[usize::try_from(rng.below(8)).expect("small")] += 1;
        }
        assert!(seen.iter().all(|&count| (850..1150).contains(&count)), "{seen:?}");
        let hits = (0..10_000).filter(|_| rng.chance(100_000)).count();
        assert!((850..1150).contains(&hits), "{hits}");
    }
}
