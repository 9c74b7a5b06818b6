package svidcache

import (
	"container/list"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/time/rate"

	"github.com/signet-id/signet/workloadapi"
)

const (
	// maxTokensPerCaller and maxTokens bound the JWT-SVIDs that are kept, per uid and in all.
	maxTokensPerCaller = 64
	maxTokens          = 16384
	// missesPerSecond and missBurst bound how often one uid can make the agent ask the CA. The burst is what a process of
	// many identities asks for when it starts.
	missesPerSecond = 100
	missBurst       = 500
	// maxMissWait is how long a caller may wait for its turn within these bounds before it is refused.
	maxMissWait = 2 * time.Second
	// maxCalls and maxCallsPerUID bound the requests for JWT-SVIDs under way.
	maxCalls       = 4096
	maxCallsPerUID = 512
	// maxTokenKeyBytes bounds what a token is remembered by; requests with more audiences are not cached.
	maxTokenKeyBytes = 4096
	// maxTokenHeaderBytes bounds the JOSE header that is read for its key id.
	maxTokenHeaderBytes = 4096
	// leastLeft is the validity that a token must have left to be handed out from the cache.
	leastLeft = 5 * time.Second
	// refreshEvery is the least time between two attempts to refresh a token behind.
	refreshEvery = 5 * time.Second
	// maxJoined is how many different errors one call names.
	maxJoined = 4
	// callTimeout bounds one request for a JWT-SVID.
	callTimeout = 30 * time.Second
)

// A jwtCache keeps JWT-SVIDs per caller's uid. One caller's requests never push out another's tokens.
type jwtCache struct {
	mu      sync.Mutex
	callers map[uint32]*jwtCaller
	recent  *list.List // of *jwtCaller, the most recently used in front
	calls   map[string]*jwtCall
	tokens  int
	slots   chan struct{} // a place for each request under way
}

type jwtCaller struct {
	uid     uint32
	element *list.Element
	limit   *rate.Limiter
	slots   chan struct{}            // a place for each of its requests under way
	tokens  map[string]*list.Element // by tokenKey
	recent  *list.List               // of *token
}

type token struct {
	key         string
	entryID     string
	revision    int64
	value       string
	keyID       string
	id          spiffeid.ID
	jti         string // empty: it has none
	issued, end time.Time
	refreshedAt time.Time // last attempt to refresh, on the steady clock
}

// A jwtCall is a request under way, on which any number of callers wait.
type jwtCall struct {
	done   chan struct{}
	answer JWTAnswer
	err    error
}

func (j *jwtCache) init() {
	j.callers = make(map[uint32]*jwtCaller)
	j.recent = list.New()
	j.calls = make(map[string]*jwtCall)
	j.slots = make(chan struct{}, maxCalls)
}

func (j *jwtCache) len() int {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.tokens
}

// FetchJWTSVIDs returns a JWT-SVID for each of the caller's identities, or for id alone. It is workloadapi.Source's.
//
// The requests of one call are begun one after the other, so that what it waits for its turn is bounded for all of them
// together, and answered side by side.
func (c *Cache) FetchJWTSVIDs(ctx context.Context, caller workloadapi.Caller, id spiffeid.ID, audience []string) ([]workloadapi.JWTSVID, error) {
	entries, err := c.entriesOf(ctx, caller, id)
	if err != nil {
		return nil, err
	}
	if c.source.Load() != nil {
		// What was restored is no word of the CA's: nothing is asked for by it.
		syncCtx, cancel := context.WithTimeout(ctx, syncWait)
		err := c.config.CA.Sync(syncCtx)
		cancel()
		if err != nil {
			return nil, fmt.Errorf("%w: %w", workloadapi.ErrUnavailable, err)
		}
		if entries, err = c.entriesOf(ctx, caller, id); err != nil {
			return nil, err
		}
	}
	turn := &turn{uid: caller.UID, end: time.Now().Add(maxMissWait)}
	svids := make([]workloadapi.JWTSVID, len(entries))
	calls := make([]*jwtCall, len(entries))
	for i, e := range entries {
		svids[i] = workloadapi.JWTSVID{ID: e.spiffeID, Hint: e.hint, Privileged: e.privileged}
		if svids[i].Token, calls[i], err = c.jwt(ctx, turn, e, audience); err != nil {
			return nil, err
		}
	}
	var errs []error
	for i, call := range calls {
		if call == nil {
			continue
		}
		select {
		case <-call.done:
			svids[i].Token = call.answer.Token
			if call.err != nil {
				errs = append(errs, call.err)
			}
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if len(errs) > 0 {
		return nil, fmt.Errorf("%w: %w", workloadapi.ErrUnavailable, joinDistinct(errs))
	}
	return svids, nil
}

// joinDistinct joins errors of which those with the same text stand once, and not too many.
func joinDistinct(errs []error) error {
	var distinct []error
	for i, err := range errs {
		if slices.ContainsFunc(distinct, func(e error) bool { return e.Error() == err.Error() }) {
			continue
		}
		if len(distinct) == maxJoined {
			distinct = append(distinct, fmt.Errorf("and more, in %d further errors", len(errs)-i))
			break
		}
		distinct = append(distinct, err)
	}
	return errors.Join(distinct...)
}

// entriesOf returns the caller's entries in their order, those of id alone if it is not zero, without those whose JWT-SVIDs
// are revoked. It waits for a registration in flight.
func (c *Cache) entriesOf(ctx context.Context, caller workloadapi.Caller, id spiffeid.ID) ([]*entry, error) {
	found, err := c.registered(ctx, caller, id)
	if err != nil {
		return nil, err
	}
	if found = c.unrevoked(found); len(found) == 0 {
		return nil, workloadapi.ErrNoIdentity
	}
	return found, nil
}

func (c *Cache) registered(ctx context.Context, caller workloadapi.Caller, id spiffeid.ID) ([]*entry, error) {
	w := newWatcher(caller, false)
	find := func() []*entry {
		var found []*entry
		for _, e := range c.state.Load().match(w.selectors, c.config.Now()) {
			if id.IsZero() || e.spiffeID == id {
				found = append(found, e)
			}
		}
		return found
	}
	if found := find(); len(found) > 0 {
		return found, nil
	}
	c.subscribe(w)
	defer c.unsubscribe(w)
	if err := c.awaitEntry(ctx, w); err != nil {
		return nil, err
	}
	if found := find(); len(found) > 0 {
		return found, nil
	}
	// The caller has identities, and not this one. It too may just have been registered.
	syncCtx, cancel := context.WithTimeout(ctx, syncWait)
	defer cancel()
	if err := c.config.CA.Sync(syncCtx); err != nil {
		c.config.Log.Debug("a caller asked for an ID it does not have, and the CA could not be asked for newer entries", "uid", caller.UID, "err", err)
	}
	if found := find(); len(found) > 0 {
		return found, nil
	}
	c.refuse(w)
	return nil, workloadapi.ErrNoIdentity
}

// jwt returns a token from the cache, or the request to the CA that will bring one.
func (c *Cache) jwt(ctx context.Context, turn *turn, e *entry, audience []string) (string, *jwtCall, error) {
	key := tokenKey(e, audience)
	if e.includeJTI || len(key) > maxTokenKeyBytes {
		// Each such token is to be used once, so that none may be handed out twice.
		call, err := c.begin(ctx, turn, "", "", e, audience)
		return "", call, err
	}
	value, refresh := c.jwts.get(turn.uid, key, c.config.Now(), c.state.Load(), c.config.TrustDomain)
	if value == "" {
		call, err := c.request(ctx, turn, key, e, audience)
		return "", call, err
	}
	c.stats.jwtHits.Add(1)
	if refresh {
		// Behind the caller's back: it has a valid one. That the limits may refuse is no harm.
		_, _ = c.request(ctx, nowOrNever(turn.uid), key, e, audience)
	}
	return value, nil, nil
}

func (c *Cache) countJWT(err error) {
	if err != nil {
		c.stats.jwtErrors.Add(1)
	} else {
		c.stats.jwtIssued.Add(1)
	}
}

// A turn is how long one caller may wait until the limits let it ask the CA.
type turn struct {
	uid uint32
	end time.Time // on the steady clock
}

// nowOrNever is a turn that waits for nothing.
func nowOrNever(uid uint32) *turn { return &turn{uid: uid} }

// await waits for uid's next turn and a place for its request. The error is ErrTooMany if that takes too long, or ctx's.
func (j *jwtCache) await(ctx context.Context, t *turn) (leave func(), err error) {
	j.mu.Lock()
	u := j.caller(t.uid)
	left := max(time.Until(t.end), 0)
	reserved := u.limit.Reserve()
	wait := reserved.Delay()
	if wait > left {
		reserved.Cancel()
	}
	j.mu.Unlock()
	if wait > left {
		return nil, fmt.Errorf("%w: uid %d asks for more than %d a second", workloadapi.ErrTooMany, t.uid, missesPerSecond)
	}
	if wait > 0 {
		timer := time.NewTimer(wait)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
			reserved.Cancel()
			return nil, ctx.Err()
		}
	}
	patience := time.NewTimer(max(time.Until(t.end), 0))
	defer patience.Stop()
	taken := make([]chan struct{}, 0, 2)
	leave = func() {
		for _, slots := range taken {
			<-slots
		}
	}
	for _, slots := range []chan struct{}{u.slots, j.slots} {
		select {
		case slots <- struct{}{}:
		default:
			select {
			case slots <- struct{}{}:
			case <-patience.C:
				leave()
				return nil, fmt.Errorf("%w: %d requests of uid %d are under way, %d in all", workloadapi.ErrTooMany, len(u.slots), t.uid, len(j.slots))
			case <-ctx.Done():
				leave()
				return nil, ctx.Err()
			}
		}
		taken = append(taken, slots)
	}
	return leave, nil
}

// request returns the request under way for key, or begins one.
func (c *Cache) request(ctx context.Context, turn *turn, key string, e *entry, audience []string) (*jwtCall, error) {
	name := strconv.FormatUint(uint64(turn.uid), 10) + " " + key
	if call := c.jwts.find(name); call != nil {
		return call, nil
	}
	return c.begin(ctx, turn, name, key, e, audience)
}

// begin asks the CA for a token when the limits allow it. The request outlives the caller that began it. Others find it
// by its name, unless that is empty; then what it brings is not kept either.
func (c *Cache) begin(ctx context.Context, turn *turn, name, key string, e *entry, audience []string) (*jwtCall, error) {
	leave, err := c.jwts.await(ctx, turn)
	if err != nil {
		if errors.Is(err, workloadapi.ErrTooMany) {
			c.stats.rateLimited.Add(1)
		}
		return nil, err
	}
	call, begun := c.jwts.join(name)
	if !begun { // somebody was faster
		leave()
		return call, nil
	}
	audience = slices.Clone(audience)
	started := c.start(func() {
		defer leave()
		ctx, cancel := context.WithTimeout(c.ctx, callTimeout)
		defer cancel()
		answer, err := c.config.CA.NewJWTSVID(ctx, e.id, audience)
		if err == nil {
			err = checkJWT(e, audience, answer, c.config.Now())
		}
		t := newToken(key, e, answer)
		if err == nil && t.revoked(c.state.Load()) {
			err = errors.New("it was revoked as soon as it was issued")
		}
		if err != nil {
			answer = JWTAnswer{}
		}
		c.countJWT(err)
		if err != nil || name == "" {
			t = nil
		}
		c.jwts.leave(turn.uid, name, t)
		call.answer, call.err = answer, err
		close(call.done)
	})
	if !started {
		leave()
		c.jwts.leave(turn.uid, name, nil)
		call.err = errStopped
		close(call.done)
	}
	return call, nil
}

// find returns the call under way of that name, or nil.
func (j *jwtCache) find(name string) *jwtCall {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.calls[name]
}

// join returns the call under way of that name, or begins one, which an empty name hides.
func (j *jwtCache) join(name string) (call *jwtCall, begun bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if call := j.calls[name]; call != nil {
		return call, false
	}
	call = &jwtCall{done: make(chan struct{})}
	if name != "" {
		j.calls[name] = call
	}
	return call, true
}

// leave ends the call of that name and keeps the token that it brought, if any.
func (j *jwtCache) leave(uid uint32, name string, t *token) {
	j.mu.Lock()
	defer j.mu.Unlock()
	delete(j.calls, name)
	if t != nil {
		j.put(uid, t)
	}
}

func newToken(key string, e *entry, a JWTAnswer) *token {
	return &token{
		key: key, entryID: e.id, revision: e.revision, value: a.Token, keyID: keyIDOf(a.Token), id: e.spiffeID, jti: jtiOf(a.Token), issued: a.IssuedAt, end: a.ExpiresAt,
	}
}

// caller returns what is kept for uid, as the most recently used. It is called with mu held.
func (j *jwtCache) caller(uid uint32) *jwtCaller {
	u := j.callers[uid]
	if u == nil {
		u = &jwtCaller{
			uid: uid, limit: rate.NewLimiter(missesPerSecond, missBurst), slots: make(chan struct{}, maxCallsPerUID),
			tokens: make(map[string]*list.Element), recent: list.New(),
		}
		u.element = j.recent.PushFront(u)
		j.callers[uid] = u
		for len(j.callers) > maxTokens/maxTokensPerCaller*4 {
			j.forget(j.recent.Back().Value.(*jwtCaller))
		}
	}
	j.recent.MoveToFront(u.element)
	return u
}

func (j *jwtCache) forget(u *jwtCaller) {
	j.tokens -= len(u.tokens)
	j.recent.Remove(u.element)
	delete(j.callers, u.uid)
}

// put keeps t for uid. It is called with mu held.
func (j *jwtCache) put(uid uint32, t *token) {
	u := j.caller(uid)
	if old := u.tokens[t.key]; old != nil {
		j.remove(u, old)
	}
	u.tokens[t.key] = u.recent.PushFront(t)
	j.tokens++
	for len(u.tokens) > maxTokensPerCaller {
		j.remove(u, u.recent.Back())
	}
	for j.tokens > maxTokens {
		j.forget(j.recent.Back().Value.(*jwtCaller))
	}
}

func (j *jwtCache) remove(u *jwtCaller, element *list.Element) {
	delete(u.tokens, element.Value.(*token).key)
	u.recent.Remove(element)
	j.tokens--
}

// get returns a token that is good now, and whether it is time to refresh it.
func (j *jwtCache) get(uid uint32, key string, now time.Time, s *state, td spiffeid.TrustDomain) (value string, refresh bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	u := j.callers[uid]
	if u == nil {
		return "", false
	}
	element := u.tokens[key]
	if element == nil {
		return "", false
	}
	t := element.Value.(*token)
	if !t.good(now, s, td) {
		j.remove(u, element)
		return "", false
	}
	u.recent.MoveToFront(element)
	j.recent.MoveToFront(u.element)
	half := t.issued.Add(t.end.Sub(t.issued) / 2)
	if !now.Before(half) && time.Since(t.refreshedAt) >= refreshEvery {
		t.refreshedAt = time.Now()
		refresh = true
	}
	return t.value, refresh
}

// good says whether t may be handed out: it is valid for a while, its entry is as it was, and its key is still published
// and not tainted. A token from the future is from before the clock was put back, and verifiers would refuse it.
func (t *token) good(now time.Time, s *state, td spiffeid.TrustDomain) bool {
	if now.Add(leastLeft).After(t.end) || t.issued.After(now.Add(time.Minute)) {
		return false
	}
	e, ok := s.entries.get(t.entryID)
	if !ok || e.revision != t.revision {
		return false
	}
	own := s.bundles[td]
	return own != nil && has(own.jwtKnown, t.keyID) && !t.revoked(s)
}

func (t *token) revoked(s *state) bool {
	_, found := s.revoked.serving.JWTSVID(t.id, t.jti, t.issued)
	return found
}

// sweep drops what may not be handed out any more.
func (j *jwtCache) sweep(s *state, td spiffeid.TrustDomain, now time.Time) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, u := range j.callers {
		for _, element := range u.tokens {
			if !element.Value.(*token).good(now, s, td) {
				j.remove(u, element)
			}
		}
	}
}

// tokenKey is what a token is remembered by: the entry, its revision, and the audiences in their order.
func tokenKey(e *entry, audience []string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %d", e.id, e.revision)
	for _, a := range audience {
		fmt.Fprintf(&b, " %d:%s", len(a), a)
	}
	return b.String()
}

// keyIDOf reads the key id from a JWT-SVID's header; it is empty if there is none, and then the token is not cached.
func keyIDOf(jwt string) string {
	header, _, ok := strings.Cut(jwt, ".")
	if !ok || len(header) > maxTokenHeaderBytes {
		return ""
	}
	raw, err := base64.RawURLEncoding.DecodeString(header)
	if err != nil {
		return ""
	}
	var h struct {
		KeyID string `json:"kid"`
	}
	if err := json.Unmarshal(raw, &h); err != nil {
		return ""
	}
	return h.KeyID
}
