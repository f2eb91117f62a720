/*
Package rollout takes a new version of something to everybody, stage by stage, inside the program that serves it: it
decides who gets the new version, measures how both versions fare, promotes on evidence and rolls back by itself. It is
a library; it needs no server, no sidecar and no feature-flag service.

The new version is the candidate, the old one the stable version. A [Rollout] is made of a [Policy], asked for a [Unit]
(a user, tenant, host or job), told what came of it, and run by the program:

	var checkout = rollout.Must("checkout-v2", rollout.Policy{
		Stages:   rollout.Percentages(1, 10, 50, 100),
		Bake:     10 * time.Minute,
		Holdback: 5, // kept on the stable version until the end: the control
		Gates: []rollout.Gate{
			rollout.Errors.Within(1),  // at most 1 percentage point above control
			rollout.Errors.AtMost(10), // and never above 10 %
		},
	}, nil)

	func main() {
		go checkout.Run(context.Background())
		http.Handle("/checkout", checkout.Handler(newCheckout, oldCheckout))
		http.ListenAndServe(":8080", rollout.Middleware(unitOf)(http.DefaultServeMux))
	}

	func unitOf(r *http.Request) rollout.Unit { return rollout.Unit{Key: r.Header.Get("X-User-ID")} }

[New] and [Must] start nothing and do no I/O. [Rollout.Run] blocks in a goroutine that the caller owns, and nothing is
judged and nothing moves unless it runs. All methods may be called from any goroutine and any callback. A nil *Rollout
decides stable.

# Assignment

A unit's key has a fixed point, its [Bucket]; it is in a share of p percent if its bucket lies in the lowest p percent.
So a unit keeps its version for as long as the share does not fall, raising a share never takes a unit out, and rollouts
choose independently of each other unless they share a Salt. Shares may be of any fineness.

A [Ring] is an audience, such as the staff or a region; a unit belongs to the first ring that takes it, and to
[Everyone] otherwise. A [Stage] gives a share of a ring. Rings are nested: 100 % of Everyone is 100 % of every ring. A
unit without a key gets the candidate only where its whole ring does.

Deciding takes no lock, allocates nothing and cannot fail. Whatever goes wrong, not loaded, no key, another version, the
answer is stable, and [Decision.Reason] says why.

# Evidence and gates

A keyed unit of a ring under way is in a [Cohort]: Candidate or Control, and outcomes are compared between the two.
[Errors] and [Latency] are recorded by [Middleware], [Rollout.Handler], [Do] and [Rollout.Do]; [NewRate], [NewTiming],
[NewScore] and [NewMix] make more, for [Decision.Record] and [Record]. [Observation.Because] gives one a rationale, which
an [Incident] shows.

A [Gate] is a claim on a metric. Rates have [Rate.Within], [Rate.WithinFactor], [Rate.AtMost], [Rate.NoWorse] and
[Rate.Never]; timings [Quantile.WithinFactor], [Quantile.AtMost] and [Timing.NoWorse]; scores [Score.Within],
[Score.AtLeast] and [Score.NoWorse]; mixes [Mix.Within] and [Mix.NoChange]; [Check] asks anything else. A gate is
Unhealthy once its claim is proven broken, Healthy once it is proven kept, and Inconclusive until then. The tests are
anytime-valid: gates are judged at every tick, and Policy.FalseRollback and Policy.FalsePromotion bound the errors
however often they look.

A broken gate rolls back, or does what [Gate.OnFail] says: roll back its ring, step back, hold, or report. A stage is
left once it has baked, its gates are silent and, from Policy.ProveFrom on, every gate that can prove its claim has done
so. No data, an error or a panic never promotes: a bake counts only while outcomes arrive, and a stage with no verdict
by its deadline holds or rolls back.

A comparison needs a control: in a stage of 100 % there is one only with a Holdback. [Policy.Validate] refuses policies
that would be blind, or could never be promoted safely, and names every problem at once.

# Control and operators

[Rollout.Status] is a pure read of everything that is known, and marshals to JSON; [Rollout.Subscribe] gets each
[Event]. [Rollout.Hold] and [Rollout.Resume] stop and go on, [Rollout.Approve] lets a stage with Approval be left,
[Rollout.Advance] leaves one without waiting, [Rollout.SetPercent] sets a share. Each takes a note, which says who and
why. Policy.MayAdvance keeps to change windows; a rollback is never asked. Events are logged with [log/slog], and Run
reports to OpenTelemetry.

# Rollback

[Rollout.Rollback], or a broken gate, gives everybody the stable version. Once Rollback has returned, no new decision in
this process is Candidate, even if the [Store] failed; requests and jobs that were answered before keep their answer.
Then sessions on the candidate are told and, after a grace, cut; Run runs the policy's rollback steps, in order and at
least once each; and what the candidate did to the world is undone, the newest first, as far as [Decision.Journal] was
told before it was done. What keeps failing leaves the rollout Stuck, which is loud: [Rollout.Rollback] tries again,
[Rollout.Waive] does without. A process that dies on the way is followed by another one. The [Incident] says what
happened, with its evidence, and [Incident.WasExposed] to whom.

A rollback lasts, also across restarts where there is a Store, until [Rollout.Restart] or a Version that was never seen
before. [Rollout.RollbackRing] rolls back one ring alone.

# Sessions and agents

What takes longer than a request, such as a conversation, a job or the run of an agent, is a [Session]: [Rollout.Begin]
keeps a unit to its version until [Session.End], which is its one outcome. A promotion leaves it as it is. On a rollback
[Session.Revoked] closes: finish the turn, then hand over. SessionPolicy says how long that may take, and its OnRevoke
can move a live agent to the stable configuration instead. [Session.Pin] and [Rollout.Adopt] take a session from one
process to another, [Rollout.Drain] waits for all of them.

# HTTP

[Middleware] puts the unit of a request into its context. All through that request, [Rollout.Handler], [Rollout.Enabled]
and [Rollout.DecideContext] give one answer for each rollout, whatever happens to the stage meanwhile; at the end Errors
and Latency are recorded once on each rollout that was decided. A response of 500 or more and a panic are errors; a
client that cancelled is none.

# Without HTTP

[Rollout.Do], and [Do] for functions with a result, run one of two functions and record how it went. [Rollout.Decide]
and [Decision.Record] do it by hand, where the outcome comes later; where it comes elsewhere, the decision travels as a
token, see [Rollout.ParseDecision]. [NewContext] is for frameworks other than net/http: one context for one request or
job.

Tests force answers with package rollouttest.

# Stores

A [Store] keeps the state across restarts and shares it between any number of processes: they follow the same stage, gates
judge the sum of what all of them have counted, and a rollback is everybody's. None of them leads. [DirStore] is a directory for the processes of one machine, [MemStore] is for tests, and any database
with a compare-and-swap can be one. Without a Store, a restart forgets everything, also a rollback, and two processes
each decide for themselves. While a Store fails, shares stay as they are and nothing advances, but a broken gate still
rolls back here; Options.Lease limits how long.

# What it does not do

It does not deploy: both versions are in the running program. It does not route between machines. It is not a
feature-flag service with targeting rules and remote configuration, and not an experiment platform: it asks whether the
candidate does harm, not which of many variants wins. It cannot undo what the candidate did, other than by the rollback
steps and the undo functions it is given.
*/
package rollout
