package svidfiles

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/exp/svid/witsvid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Events that a Teller is told.
const (
	Renewed = "renewed" // there are new files
	Removed = "removed" // the identity is gone, and so are the files
)

// A Teller tells the program that reads the files what has happened to them. Exec and Signal are such.
type Teller interface {
	Tell(ctx context.Context, event string) error
	String() string
}

// A State is what the files show. What was not asked for is nil.
type State struct {
	X509   *workloadapi.X509Context
	Tokens map[string]*jwtsvid.SVID // by audience
	WIT    []*witsvid.SVID
}

// Config is what a Keeper needs. Options, and X509, WIT or Layout.Tokens, have no default.
type Config struct {
	// Options say where the Workload API is.
	Options []workloadapi.ClientOption

	// X509 asks for X509-SVIDs, WIT for WIT-SVIDs. At most one of them is set. Without both only tokens are kept.
	X509, WIT bool

	// ID is whose tokens are kept. Zero: JWT-SVIDs of the first identity, WIT-SVIDs of all.
	ID spiffeid.ID

	// Dir is where files go, and Layout says what they are called. Nil: nowhere.
	Dir    *Dir
	Layout Layout

	// Tellers are told, one after the other, when there are new files. One that fails is told again.
	Tellers []Teller

	// RemoveWhenGone takes the files away when the agent says that this process has no identity any more. Otherwise they
	// stay, as they do while the agent is away.
	RemoveWhenGone bool

	// OnState is called with what the files show, after they have been written. An error ends a Keeper that never had
	// anything to show before.
	OnState func(State) error

	// Warn gets what an operator should know: one thing, and why.
	Warn func(error)

	// Now is the clock. Nil means time.Now.
	Now func() time.Time
}

// A Keeper keeps files up to date until it is told to stop. It is used once, by one goroutine; another one of its own
// follows the Workload API.
type Keeper struct {
	cfg    Config
	latest latest

	x509    *workloadapi.X509Context
	wit     []*witsvid.SVID
	witAt   time.Time // when they came
	tokens  map[string]*jwtsvid.SVID
	replace map[string]time.Time // when a token is to be replaced
	shown   bool                 // the files show something
	gone    bool                 // the agent has said that there is no identity

	due     bool // files are to be written
	tell    []Teller
	event   string
	write   backoff
	fetch   backoff
	again   backoff
	writeAt time.Time // when a write that failed is tried again
	fetchAt time.Time // when tokens are fetched
	tellAt  time.Time // when tellers are told
	warnAt  time.Time // when the state is looked at for its end
}

// NewKeeper returns a Keeper for Run.
func NewKeeper(cfg Config) *Keeper {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Keeper{cfg: cfg, latest: latest{changed: make(chan struct{}, 1)}, tokens: map[string]*jwtsvid.SVID{}, replace: map[string]time.Time{}}
}

// Run keeps the files until ctx ends, which is no error. The first files that cannot be written end it; later it
// tries again, and so it does whatever the agent says.
func (k *Keeper) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var following sync.WaitGroup
	defer following.Wait()
	defer cancel()
	ended := make(chan error, 1)
	if k.cfg.X509 {
		following.Go(func() { ended <- workloadapi.WatchX509Context(ctx, &k.latest, k.cfg.Options...) })
	}
	if k.cfg.WIT {
		following.Go(func() { ended <- k.followWIT(ctx) })
	}
	if len(k.cfg.Layout.Tokens) > 0 && !k.cfg.X509 {
		k.fetchAt = k.cfg.Now() // otherwise with the first X509-SVID
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-ended:
			if ctx.Err() != nil {
				return nil
			}
			return err
		case <-k.latest.changed:
			k.take()
		case <-timer.C:
		}
		if err := k.work(ctx); err != nil {
			return err
		}
		timer.Reset(k.wait())
	}
}

// work does what is due.
func (k *Keeper) work(ctx context.Context) error {
	now := k.cfg.Now()
	if due(k.fetchAt, now) {
		k.fetchTokens(ctx)
	}
	if k.due && k.complete() && !now.Before(k.writeAt) {
		if err := k.show(); err != nil {
			if !k.shown {
				return err
			}
			k.writeAt = now.Add(k.write.next())
			k.cfg.Warn(fmt.Errorf("%w; the files are those of before, and it is tried again", err))
		}
	}
	if due(k.tellAt, now) {
		k.tellAll(ctx)
	}
	if due(k.warnAt, now) {
		k.warnOfEnd()
	}
	return nil
}

func due(at, now time.Time) bool { return !at.IsZero() && !now.Before(at) }

// wait is how long nothing is due. The wall clock is looked at again before long, since it may jump.
func (k *Keeper) wait() time.Duration {
	const longest = 30 * time.Second
	next := longest
	times := []time.Time{k.fetchAt, k.tellAt, k.warnAt}
	if k.due && k.complete() {
		times = append(times, k.writeAt)
	}
	for _, at := range times {
		if !at.IsZero() {
			next = min(next, at.Sub(k.cfg.Now()))
		}
	}
	return max(next, time.Millisecond)
}

// complete says whether all that belongs to a set is there.
func (k *Keeper) complete() bool {
	if k.cfg.X509 && k.x509 == nil || k.cfg.WIT && k.wit == nil {
		return false
	}
	for audience := range k.cfg.Layout.Tokens {
		if k.tokens[audience] == nil {
			return false
		}
	}
	return true
}

// take takes over what the Workload API has said last.
func (k *Keeper) take() {
	x, wit, err := k.latest.take()
	if x != nil || wit != nil {
		k.x509, k.wit, k.witAt, k.due, k.gone = x, wit, k.cfg.Now(), true, false
		k.writeAt = time.Time{}
		k.warnAt = k.nextWarning(time.Time{})
		if len(k.tokens) < len(k.cfg.Layout.Tokens) {
			k.fetchAt = k.cfg.Now()
		}
	}
	if err != nil {
		k.failed(err)
	}
}

// failed judges an error of the Workload API: whether the agent is away, or says that there is no identity.
func (k *Keeper) failed(err error) {
	if status.Code(err) == codes.Canceled {
		return
	}
	if status.Code(err) != codes.PermissionDenied || !k.shown {
		k.cfg.Warn(err)
		return
	}
	if k.gone {
		return // said already
	}
	k.gone = true
	if !k.cfg.RemoveWhenGone {
		k.cfg.Warn(fmt.Errorf("the identity is gone, and the files stay: %w", err))
		return
	}
	k.cfg.Warn(fmt.Errorf("the identity is gone, and the files with it: %w", err))
	k.x509, k.wit, k.due, k.shown, k.warnAt = nil, nil, false, false, time.Time{}
	clear(k.tokens)
	if k.cfg.Dir != nil {
		if err := k.cfg.Dir.Remove(); err != nil {
			k.cfg.Warn(fmt.Errorf("removing the files: %w", err))
		}
	}
	k.start(Removed)
}

// show writes the files, and has the program told.
func (k *Keeper) show() error {
	if k.cfg.Dir != nil {
		files, err := k.cfg.Layout.Files(k.x509, k.tokens)
		if err != nil {
			return err
		}
		tokens, err := witFiles(k.wit)
		if err != nil {
			return err
		}
		files = append(files, tokens...)
		if err := k.cfg.Dir.Publish(files); err != nil {
			return err
		}
	}
	if k.cfg.OnState != nil {
		if err := k.cfg.OnState(State{X509: k.x509, Tokens: k.tokens, WIT: k.wit}); err != nil {
			return err
		}
	}
	k.due, k.shown, k.writeAt = false, true, time.Time{}
	k.write.reset()
	k.start(Renewed)
	return nil
}

// start has everybody told, anew if that is under way.
func (k *Keeper) start(event string) {
	k.event, k.tell, k.tellAt = event, slices.Clone(k.cfg.Tellers), time.Time{}
	k.again.reset()
	if len(k.tell) > 0 {
		k.tellAt = k.cfg.Now()
	}
}

// tellAll tells those who have not been told yet.
func (k *Keeper) tellAll(ctx context.Context) {
	var left []Teller
	for _, t := range k.tell {
		if err := t.Tell(ctx, k.event); err != nil && ctx.Err() == nil {
			left = append(left, t)
			k.cfg.Warn(fmt.Errorf("telling of %s files: %w; it is tried again", k.event, err))
		}
	}
	k.tell, k.tellAt = left, time.Time{}
	if len(left) > 0 {
		k.tellAt = k.cfg.Now().Add(k.again.next())
	}
}

// fetchTokens fetches a token for each audience. Those that do not come stay as they were.
func (k *Keeper) fetchTokens(ctx context.Context) {
	const patience = 10 * time.Second
	k.fetchAt = time.Time{}
	now := k.cfg.Now()
	var failed error
	for audience := range k.cfg.Layout.Tokens {
		if k.tokens[audience] != nil && now.Before(k.replace[audience]) {
			continue
		}
		one, cancel := context.WithTimeout(ctx, patience)
		t, err := workloadapi.FetchJWTSVID(one, jwtsvid.Params{Audience: audience, Subject: k.cfg.ID}, k.cfg.Options...)
		cancel()
		if err != nil {
			failed = err
			continue
		}
		k.replace[audience] = replaceAt(t, now)
		if old := k.tokens[audience]; old == nil || old.Marshal() != t.Marshal() {
			k.tokens[audience], k.due = t, true
		}
		k.gone = false
	}
	if ctx.Err() != nil {
		return
	}
	if failed != nil {
		k.fetchAt = now.Add(k.fetch.next())
		if !k.cfg.X509 {
			k.failed(failed)
		} else {
			k.cfg.Warn(fmt.Errorf("fetching a JWT-SVID: %w; it is tried again", failed))
		}
	} else {
		k.fetch.reset()
		for _, at := range k.replace {
			if k.fetchAt.IsZero() || at.Before(k.fetchAt) {
				k.fetchAt = at
			}
		}
	}
	k.warnAt = k.nextWarning(time.Time{})
}

// replaceAt is when a token is to be replaced: at half of its life. The agent may have handed out one that is older than
// that, and has a new one made meanwhile; then it is asked again before long.
func replaceAt(t *jwtsvid.SVID, now time.Time) time.Time {
	half := issued(t, now).Add(t.Expiry.Sub(issued(t, now)) / 2)
	soon := now.Add(max(time.Second, t.Expiry.Sub(now)/8))
	if half.Before(soon) {
		return soon
	}
	return half
}

// issued is when a token was made; now if it does not say.
func issued(t *jwtsvid.SVID, now time.Time) time.Time {
	if iat, ok := t.Claims["iat"].(float64); ok {
		return time.Unix(int64(iat), 0)
	}
	return now
}

// An ending is a part of the state with its validity.
type ending struct {
	what        string
	since, last time.Time
}

func (k *Keeper) endings() []ending {
	var all []ending
	if k.x509 != nil {
		for _, s := range k.x509.SVIDs {
			all = append(all, ending{"the X509-SVID " + s.ID.String(), s.Certificates[0].NotBefore, s.Certificates[0].NotAfter})
		}
	}
	for _, s := range k.wit {
		all = append(all, ending{"the WIT-SVID " + s.ID.String(), k.witAt, s.Expiry})
	}
	for _, t := range k.tokens {
		all = append(all, ending{"the JWT-SVID for " + strings.Join(t.Audience, " "), issued(t, t.Expiry), t.Expiry})
	}
	return all
}

// nextWarning is when the next part of the state should have been renewed long ago, or ends.
func (k *Keeper) nextWarning(after time.Time) time.Time {
	var next time.Time
	for _, e := range k.endings() {
		for _, at := range []time.Time{e.since.Add(e.last.Sub(e.since) * 4 / 5), e.last} {
			if at.After(after) && (next.IsZero() || at.Before(next)) {
				next = at
			}
		}
	}
	return next
}

// warnOfEnd tells which files were not renewed in time.
func (k *Keeper) warnOfEnd() {
	now := k.cfg.Now()
	for _, e := range k.endings() {
		switch {
		case !now.Before(e.last):
			k.cfg.Warn(fmt.Errorf("%s has ended at %s and was not renewed: nobody accepts it any more", e.what, e.last.UTC().Format(time.RFC3339)))
		case !now.Before(e.since.Add(e.last.Sub(e.since) * 4 / 5)):
			k.cfg.Warn(fmt.Errorf("%s ends at %s and was not renewed yet", e.what, e.last.UTC().Format(time.RFC3339)))
		}
	}
	k.warnAt = k.nextWarning(now)
}

// latest is the last word of the Workload API. A word that was not taken is replaced by the next.
type latest struct {
	changed chan struct{}

	mu  sync.Mutex
	x   *workloadapi.X509Context
	wit []*witsvid.SVID
	err error
}

func (l *latest) put(f func()) {
	l.mu.Lock()
	f()
	l.mu.Unlock()
	select {
	case l.changed <- struct{}{}:
	default:
	}
}

func (l *latest) take() (*workloadapi.X509Context, []*witsvid.SVID, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	x, wit, err := l.x, l.wit, l.err
	l.x, l.wit, l.err = nil, nil, nil
	return x, wit, err
}

// OnX509ContextUpdate implements workloadapi.X509ContextWatcher.
func (l *latest) OnX509ContextUpdate(x *workloadapi.X509Context) {
	l.put(func() { l.x, l.err = x, nil })
}

// OnX509ContextWatchError implements workloadapi.X509ContextWatcher.
func (l *latest) OnX509ContextWatchError(err error) { l.put(func() { l.err = err }) }

// A backoff grows from one second to a minute, with jitter.
type backoff struct{ failures int }

func (b *backoff) next() time.Duration {
	const first, most = time.Second, time.Minute
	d := min(first<<min(b.failures, 6), most)
	b.failures++
	return d/2 + rand.N(d/2+1)
}

func (b *backoff) reset() { b.failures = 0 }

// Once fetches a state, shows it and tells of it, all of which must succeed.
func (k *Keeper) Once(ctx context.Context) error {
	var err error
	if k.cfg.X509 {
		if k.x509, err = workloadapi.FetchX509Context(ctx, k.cfg.Options...); err != nil {
			return err
		}
	}
	if k.cfg.WIT {
		if k.wit, err = workloadapi.FetchWITSVIDs(ctx, k.idAsked(), k.cfg.Options...); err != nil {
			return err
		}
	}
	for audience := range k.cfg.Layout.Tokens {
		if k.tokens[audience], err = workloadapi.FetchJWTSVID(ctx, jwtsvid.Params{Audience: audience, Subject: k.cfg.ID}, k.cfg.Options...); err != nil {
			return err
		}
	}
	if err := k.show(); err != nil {
		return err
	}
	var errs []error
	for _, t := range k.tell {
		errs = append(errs, t.Tell(ctx, Renewed))
	}
	return errors.Join(errs...)
}
