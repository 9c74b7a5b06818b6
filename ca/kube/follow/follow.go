// Package follow keeps up with the objects of one kind at an API server: a whole list, then a watch from where the list ended, and a list
// again when the watch cannot be continued. It holds no objects itself; its Store does, in the form that it needs.
//
// It stands in the place of client-go's reflector and its caches, which keep whole objects, may begin with a list that is
// older than what was known, take lists of any size, and do not tell whether what they hold is still true.
package follow

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
)

const (
	pageSize = 500
	maxPages = 4000
	// openTimeout bounds how long one page or the beginning of a watch may take, with all that client-go retries by itself.
	openTimeout = time.Minute
	// A watch is begun anew after so long: an API server that was restarted gets its share again.
	minWatch, maxWatch = 30 * time.Minute, time.Hour
	// lostAfter is how long nothing may be heard until what is known counts as old.
	lostAfter = 5 * time.Minute
	// maxVain is how many watches may end at once, with nothing heard, before a list is tried.
	maxVain = 8
	// steady is how long a watch has to live for its end to be no failure.
	steady              = 10 * time.Second
	minDelay, maxDelay  = 500 * time.Millisecond, 30 * time.Second
	logEvery            = time.Minute
	maxErrorText        = 400
	watchContactTimeout = time.Second
	// roomEvery is how often a Hungry Store is asked, give or take a half.
	roomEvery = time.Minute
)

// A Store is told what there is. It is called by one goroutine at a time, and keeps nothing of an object that it need not.
type Store interface {
	// Begin begins a list. What is Put from now to End is all there is.
	Begin()
	// Put tells of an object that is there, new or changed.
	Put(metav1.Object)
	// End tells that the list is whole. One that breaks off has none, and is followed by another Begin; until then what was
	// there before still holds.
	End()
	// Delete tells of an object that is gone.
	Delete(metav1.Object)
}

// A Placed Store is told, besides, up to which resource version it was told everything: after a list, after each event, and when
// nothing happened for a while. Versions of one kind can be compared: newer ones are larger.
type Placed interface {
	At(version uint64)
}

// A Hungry Store has a bound, and tells that it left something out for which there may be room by now. All is listed again then, once in a
// minute at most: no change of what was left out would bring it otherwise.
type Hungry interface {
	Hungry() bool
}

// Config says what a Follower follows.
type Config struct {
	// Name says what the objects are, such as "pods".
	Name  string
	List  func(context.Context, metav1.ListOptions) (runtime.Object, error)
	Watch func(context.Context, metav1.ListOptions) (watch.Interface, error)
	Store Store
	// Changed is called after Status().Known has changed. It must not block.
	Changed func()
	Log     *slog.Logger

	// For tests; zero means the constants above.
	LostAfter, MinDelay, MaxDelay, RoomEvery time.Duration
}

// Status says how far a Follower is.
type Status struct {
	// Known tells that the Store holds what is at the API server, but for what just happens. It is false until the first
	// list, and when nothing was heard for five minutes, until the next one.
	Known bool
	// Err is why nothing is heard at the moment; nil if all is well.
	Err error
	// Contact is when something was heard last.
	Contact time.Time
}

// A Follower follows in Run.
type Follower struct {
	c Config

	mu       sync.Mutex
	status   Status
	logged   string // the text of the failure that was logged last; empty: none
	loggedAt time.Time
}

// New returns a Follower that has not begun.
func New(c Config) *Follower {
	if c.LostAfter == 0 {
		c.LostAfter = lostAfter
	}
	if c.MinDelay == 0 {
		c.MinDelay = minDelay
	}
	if c.MaxDelay == 0 {
		c.MaxDelay = maxDelay
	}
	if c.RoomEvery == 0 {
		c.RoomEvery = roomEvery
	}
	if c.Changed == nil {
		c.Changed = func() {}
	}
	return &Follower{c: c}
}

// Status returns how far it is.
func (f *Follower) Status() Status {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.status
}

// errExpired tells that a watch cannot be continued where it ended, or should not be: all is listed again.
var errExpired = errors.New("what was seen last is too old for the API server to go on from")

// Run follows until ctx ends. Whatever the API server does, it goes on.
func (f *Follower) Run(ctx context.Context) {
	delay := f.c.MinDelay
	pause := func() {
		t := time.NewTimer(delay/2 + rand.N(delay))
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
		}
		delay = min(2*delay, f.c.MaxDelay)
	}
	for ctx.Err() == nil {
		version, err := f.list(ctx)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			f.failed(fmt.Errorf("listing %s: %w", f.c.Name, f.fix(err)))
			pause()
			continue
		}
		f.heard(true)
		for vain := 0; ctx.Err() == nil && vain < maxVain; {
			began, from := time.Now(), version
			version, err = f.watch(ctx, version)
			if ctx.Err() != nil {
				return
			}
			if time.Since(began) >= steady {
				delay = f.c.MinDelay
			}
			if vain++; version != from || err == nil && time.Since(began) >= watchContactTimeout {
				vain = 0
			}
			if err != nil && !errors.Is(err, errExpired) {
				f.failed(fmt.Errorf("watching %s: %w", f.c.Name, f.fix(err)))
			}
			pause()
			if errors.Is(err, errExpired) || f.lost() {
				break
			}
		}
	}
}

// list shows the Store all there is, page by page of one state of the API server, and returns that state's version. It is
// never older than what any API server of the cluster had acknowledged before.
func (f *Follower) list(ctx context.Context) (version string, err error) {
	f.c.Store.Begin()
	next, size := "", int64(pageSize)
	for range maxPages {
		page, err := f.page(ctx, metav1.ListOptions{Limit: size, Continue: next})
		var large interface{ TooLarge() bool }
		if errors.As(err, &large) && large.TooLarge() && size > 1 {
			// Somebody made objects that are as large as an API server takes them. They must not hide those of others.
			size = max(size/2, 1)
			continue
		}
		if err != nil {
			return "", err
		}
		size = min(2*size, pageSize)
		m, err := meta.ListAccessor(page)
		if err != nil {
			return "", fmt.Errorf("the answer is no list: %w", err)
		}
		err = meta.EachListItem(page, func(o runtime.Object) error {
			m, ok := o.(metav1.Object)
			if !ok {
				return fmt.Errorf("the list holds a %T", o)
			}
			f.c.Store.Put(m)
			return nil
		})
		if err != nil {
			return "", err
		}
		was := next
		if next = m.GetContinue(); next == "" {
			if version = m.GetResourceVersion(); version == "" || version == "0" {
				return "", errors.New("the list has no resource version")
			}
			f.c.Store.End()
			f.at(version)
			return version, nil
		}
		if next == was {
			return "", errors.New("the list goes on where it was")
		}
	}
	return "", fmt.Errorf("more than %d objects", maxPages*pageSize)
}

func (f *Follower) page(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	return f.c.List(ctx, o)
}

// Now asks the API server for the resource version of the newest state, and shows the Store nothing.
func (f *Follower) Now(ctx context.Context) (uint64, error) {
	page, err := f.page(ctx, metav1.ListOptions{Limit: 1})
	if err != nil {
		return 0, fmt.Errorf("asking how new %s are: %w", f.c.Name, err)
	}
	m, err := meta.ListAccessor(page)
	if err != nil {
		return 0, fmt.Errorf("asking how new %s are: the answer is no list: %w", f.c.Name, err)
	}
	version, err := strconv.ParseUint(m.GetResourceVersion(), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("asking how new %s are: %w", f.c.Name, clip(err))
	}
	return version, nil
}

// watch shows the Store what changes after version, until the watch ends, and returns the version to go on from.
func (f *Follower) watch(ctx context.Context, version string) (string, error) {
	seconds := int64((minWatch + rand.N(maxWatch-minWatch)).Seconds())
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	opening := time.AfterFunc(openTimeout, cancel)
	w, err := f.c.Watch(ctx, metav1.ListOptions{Watch: true, ResourceVersion: version, AllowWatchBookmarks: true, TimeoutSeconds: &seconds})
	if err == nil && !opening.Stop() {
		w.Stop()
		err = context.DeadlineExceeded
	}
	if err != nil {
		opening.Stop()
		if expired(err) {
			err = errExpired
		}
		return version, err
	}
	defer w.Stop()
	// An API server may take the request and refuse it in the first event.
	quiet := time.NewTimer(watchContactTimeout)
	defer quiet.Stop()
	var room <-chan time.Time
	hungry, bounded := f.c.Store.(Hungry)
	if bounded {
		t := time.NewTicker(f.c.RoomEvery/2 + rand.N(f.c.RoomEvery))
		defer t.Stop()
		room = t.C
	}
	for {
		select {
		case <-ctx.Done():
			return version, nil
		case <-quiet.C:
			f.heard(false)
		case <-room:
			if hungry.Hungry() {
				return version, errExpired
			}
		case e, ok := <-w.ResultChan():
			if !ok {
				return version, nil
			}
			if version, err = f.take(e, version); err != nil {
				return version, err
			}
			f.heard(false)
		}
	}
}

// take shows the Store one event.
func (f *Follower) take(e watch.Event, version string) (string, error) {
	if e.Type == watch.Error {
		err := apierrors.FromObject(e.Object)
		if expired(err) {
			return version, errExpired
		}
		// What else was in the stream is not known, and the same error would come again from here.
		f.failed(fmt.Errorf("watching %s: %w", f.c.Name, err))
		return version, errExpired
	}
	o, ok := e.Object.(metav1.Object)
	if !ok {
		f.failed(fmt.Errorf("watching %s: an event holds a %T", f.c.Name, e.Object))
		return version, errExpired
	}
	switch e.Type {
	case watch.Added, watch.Modified:
		f.c.Store.Put(o)
	case watch.Deleted:
		f.c.Store.Delete(o)
	case watch.Bookmark:
		if before(o.GetResourceVersion(), version) {
			// The API server's store was put back to an earlier state. It would say nothing of what happens until it has come to
			// where it was, and of what that state does not have.
			return version, errExpired
		}
	}
	if v := o.GetResourceVersion(); v != "" && v != "0" {
		version = v
		f.at(version)
	}
	return version, nil
}

// before tells whether one version is older than another. Versions are numbers that rise.
func before(a, b string) bool {
	x, err := strconv.ParseUint(a, 10, 64)
	if err != nil {
		return false
	}
	y, err := strconv.ParseUint(b, 10, 64)
	return err == nil && x < y
}

// fix says what to do about an answer that will not change by itself.
func (f *Follower) fix(err error) error {
	switch {
	case apierrors.IsForbidden(err):
		return fmt.Errorf("the CA may not; grant its service account list and watch on %s: %w", f.c.Name, err)
	case apierrors.IsNotFound(err):
		return fmt.Errorf("the cluster does not know them; install their definitions, or have them not read: %w", err)
	}
	return err
}

// at tells the Store how far it is. A version that is no number can be compared with nothing.
func (f *Follower) at(version string) {
	if placed, ok := f.c.Store.(Placed); ok {
		if n, err := strconv.ParseUint(version, 10, 64); err == nil {
			placed.At(n)
		}
	}
}

func expired(err error) bool { return apierrors.IsResourceExpired(err) || apierrors.IsGone(err) }

// heard notes that the API server is there. Only a list makes known what was not.
func (f *Follower) heard(listed bool) {
	f.mu.Lock()
	f.status.Contact = time.Now()
	if f.status.Err != nil && f.logged != "" {
		f.c.Log.Info("the API server answers again", "resource", f.c.Name)
		f.logged = ""
	}
	f.status.Err = nil
	changed := listed && !f.status.Known
	f.status.Known = f.status.Known || listed
	f.mu.Unlock()
	if changed {
		f.c.Changed()
	}
}

// failed notes a failure, which is logged if it is another one than before, and not more often than once a minute.
func (f *Follower) failed(err error) {
	f.mu.Lock()
	f.status.Err = clip(err)
	if text := f.status.Err.Error(); text != f.logged && time.Since(f.loggedAt) >= logEvery {
		f.c.Log.Warn("the API server does not answer as it should; trying on, and what is known stays", "resource", f.c.Name, "err", f.status.Err)
		f.logged, f.loggedAt = text, time.Now()
	}
	f.mu.Unlock()
	f.lost()
}

// clip bounds the text of an error, which may be foreign, and makes a line of it.
func clip(err error) error {
	s := err.Error()
	if len(s) > maxErrorText {
		s = s[:maxErrorText] + "..."
	}
	return errors.New(strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, s))
}

// lost tells whether a list is needed because nothing was heard for long.
func (f *Follower) lost() bool {
	f.mu.Lock()
	old := f.status.Known && time.Since(f.status.Contact) >= f.c.LostAfter
	if old {
		f.status.Known = false
		f.c.Log.Warn("nothing was heard of the API server for long; what is known may be out of date", "resource", f.c.Name, "since", f.status.Contact)
	}
	known := f.status.Known
	f.mu.Unlock()
	if old {
		f.c.Changed()
	}
	return !known
}
