package sds

import (
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
)

// stateOfTheWorld is one stream of the protocol in which each response has all that is subscribed to.
type stateOfTheWorld struct {
	wanted subscription
	node   node
	nonces nonces
	begun  bool
	sent   map[string]version // what the last response had, of what is still subscribed to
}

func (s *stateOfTheWorld) client() node { return s.node }

// request takes in a message. One that answers an older response than the last is ignored: the client answers the last
// one too, and says there what it wants by then.
func (s *stateOfTheWorld) request(req *discoveryv3.DiscoveryRequest) (*refusal, error) {
	if err := checkType(req.GetTypeUrl()); err != nil {
		return nil, err
	}
	refused, stale := s.nonces.answered(req.GetResponseNonce(), req.GetErrorDetail())
	if stale {
		return nil, nil
	}
	names, err := s.wanted.replaced(req.GetResourceNames(), !s.begun)
	if err != nil {
		return nil, err
	}
	if !s.begun {
		s.begun, s.node, s.sent = true, nodeOf(req.GetNode()), map[string]version{}
	}
	for name := range s.sent {
		if !names.has(name) {
			delete(s.sent, name) // if it is asked for again, it is sent again
		}
	}
	s.wanted = names
	return refused, nil
}

// respond is due when a resource is new to the client, has changed, or is gone. Of a resource that does not exist nothing
// is said until it does.
func (s *stateOfTheWorld) respond(o *offer) (*discoveryv3.DiscoveryResponse, error) {
	if !s.begun {
		return nil, nil
	}
	var found []resource
	now := map[string]version{}
	due := false
	for _, name := range s.wanted.names(o) {
		r, ok := o.find(name)
		if !ok {
			continue
		}
		found = append(found, r)
		now[name] = r.version
		due = due || s.sent[name] != r.version
	}
	if !due && len(now) == len(s.sent) {
		return nil, nil
	}
	resp := &discoveryv3.DiscoveryResponse{TypeUrl: secretType}
	var all [][]byte
	for _, r := range found {
		packed, err := r.pack()
		if err != nil {
			return nil, err
		}
		resp.Resources = append(resp.Resources, packed)
		all = append(all, []byte(r.name), []byte(r.version))
	}
	resp.VersionInfo = digest("state of the world", all...)
	resp.Nonce = s.nonces.next()
	s.sent = now
	return resp, nil
}
