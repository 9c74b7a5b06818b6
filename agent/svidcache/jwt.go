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
	// missesPerSecond and missBurst bound how often one uid can make the agent ask the CA.
	missesPerSecond = 50
	missBurst       = 200
	// maxCalls bounds the requests for JWT-SVIDs under way.
	maxCalls = 256
	// maxTokenKeyBytes bounds what a token is remembered by; requests with more audiences are not cached.
	maxTokenKeyBytes = 4096
	// maxTokenHeaderBytes bounds the JOSE header that is read for its key id.
	maxTokenHeaderBytes = 4096
	// leastLeft is the validity that a token must have left to be handed out from the cache.
	leastLeft = 5 * time.Second
	// refreshEvery is the least time between two attempts to refresh a token behind.
	refreshEvery = 5 * time.Second
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
}

type jwtCaller struct {
	uid     uint32
	element *list.Element
	limit   *rate.Limiter
	tokens  map[string]*list.Element // by tokenKey
	recent  *list.List               // of *token
}

type token struct {
	key         string
	entryID     string
	revision    int64
	value       string
	keyID       string
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
}

func (j *jwtCache) len() int {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.tokens
}

// FetchJWTSVIDs returns a JWT-SVID for each of the caller's identities, or for id alone. It is workloadapi.Source's.
func (c *Cache) FetchJWTSVIDs(ctx context.Context, caller workloadapi.Caller, id spiffeid.ID, audience []string) ([]workloadapi.JWTSVID, error) {
	entries, err := c.entriesOf(ctx, caller, id)
	if err != nil {
		return nil, err
	}
	svids := make([]workloadapi.JWTSVID, len(entries))
	errs := make([]error, len(entries))
	var group sync.WaitGroup
	for i, e := range entries {
		fetch := func() {
			svids[i] = workloadapi.JWTSVID{ID: e.spiffeID, Hint: e.hint}
			svids[i].Token, errs[i] = c.jwt(ctx, caller.UID, e, audience)
		}
		if len(entries) == 1 {
			fetch()
		} else {
			group.Go(fetch)
		}
	}
	group.Wait()
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return svids, nil
}

// entriesOf returns the caller's entries in their order, those of id alone if it is not zero. It waits for a
// registration in flight.
func (c *Cache) entriesOf(ctx context.Context, caller workloadapi.Caller, id spiffeid.ID) ([]*entry, error) {
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
	c.stats.noIdentity.Add(1)
	return nil, workloadapi.ErrNoIdentity
}

// jwt returns a token from the cache, or asks the CA for one.
func (c *Cache) jwt(ctx context.Context, uid uint32, e *entry, audience []string) (string, error) {
	key := tokenKey(e, audience)
	if e.includeJTI || len(key) > maxTokenKeyBytes {
		// Each such token is to be used once, so that none may be handed out twice.
		if !c.jwts.allow(uid) {
			return "", c.tooMany(uid)
		}
		ctx, cancel := context.WithTimeout(ctx, callTimeout)
		defer cancel()
		answer, err := c.config.CA.NewJWTSVID(ctx, e.id, audience)
		c.countJWT(err)
		if err != nil {
			return "", unavailable(err)
		}
		return answer.Token, nil
	}
	if value, refresh := c.jwts.get(uid, key, c.config.Now(), c.state.Load(), c.config.TrustDomain); value != "" {
		c.stats.jwtHits.Add(1)
		if refresh {
			// Behind the caller's back: it has a valid one. That the limits may refuse is no harm.
			_, _ = c.request(uid, key, e, audience)
		}
		return value, nil
	}
	call, err := c.request(uid, key, e, audience)
	if err != nil {
		return "", err
	}
	select {
	case <-call.done:
		if call.err != nil {
			return "", unavailable(call.err)
		}
		return call.answer.Token, nil
	case <-ctx.Done():
		return "", ctx.Err()
	}
}

func (c *Cache) countJWT(err error) {
	if err != nil {
		c.stats.jwtErrors.Add(1)
	} else {
		c.stats.jwtIssued.Add(1)
	}
}

func (c *Cache) tooMany(uid uint32) error {
	c.stats.rateLimited.Add(1)
	c.config.Log.Debug("too many JWT-SVID requests that the cache cannot answer; are audiences made up per call?", "uid", uid)
	return fmt.Errorf("%w: uid %d asks for more than %d new JWT-SVIDs a second", workloadapi.ErrUnavailable, uid, missesPerSecond)
}

func unavailable(err error) error { return fmt.Errorf("%w: %w", workloadapi.ErrUnavailable, err) }

// request returns the request under way for key, or starts one, which outlives the caller that began it.
func (c *Cache) request(uid uint32, key string, e *entry, audience []string) (*jwtCall, error) {
	shared := strconv.FormatUint(uint64(uid), 10) + " " + key
	call, begun := c.jwts.join(uid, shared)
	switch {
	case call == nil:
		return nil, c.tooMany(uid)
	case !begun:
		return call, nil
	}
	audience = slices.Clone(audience)
	started := c.start(func() {
		ctx, cancel := context.WithTimeout(c.ctx, callTimeout)
		defer cancel()
		answer, err := c.config.CA.NewJWTSVID(ctx, e.id, audience)
		c.countJWT(err)
		var t *token
		if err == nil {
			t = newToken(key, e, answer)
		}
		c.jwts.leave(uid, shared, t)
		call.answer, call.err = answer, err
		close(call.done)
	})
	if !started {
		c.jwts.leave(uid, shared, nil)
		call.err = errStopped
		close(call.done)
	}
	return call, nil
}

// join returns the call under way of that name, or begins one. It is nil if the limits do not allow another.
func (j *jwtCache) join(uid uint32, name string) (call *jwtCall, begun bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if call := j.calls[name]; call != nil {
		return call, false
	}
	if len(j.calls) >= maxCalls || !j.caller(uid).limit.Allow() {
		return nil, false
	}
	call = &jwtCall{done: make(chan struct{})}
	j.calls[name] = call
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
		key: key, entryID: e.id, revision: e.revision, value: a.Token, keyID: keyIDOf(a.Token), issued: a.IssuedAt, end: a.ExpiresAt,
	}
}

// allow takes one of uid's requests to the CA.
func (j *jwtCache) allow(uid uint32) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.caller(uid).limit.Allow()
}

// caller returns what is kept for uid, as the most recently used. It is called with mu held.
func (j *jwtCache) caller(uid uint32) *jwtCaller {
	u := j.callers[uid]
	if u == nil {
		u = &jwtCaller{uid: uid, limit: rate.NewLimiter(missesPerSecond, missBurst), tokens: make(map[string]*list.Element), recent: list.New()}
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
	return own != nil && has(own.jwtKnown, t.keyID)
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
