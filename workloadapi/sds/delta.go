package sds

import (
	"slices"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
)

// delta is one stream of the protocol in which each response has what is new, changed or gone.
type delta struct {
	wanted subscription
	node   node
	nonces nonces
	begun  bool

	// sent is what the client has: the version of a resource, or absent, of which it knows that it does not exist.
	sent map[string]version
}

// absent is the version of a resource that does not exist.
const absent version = ""

func (d *delta) client() node { return d.node }

// request takes in a message. It may subscribe and unsubscribe, answer a response, or both.
func (d *delta) request(req *discoveryv3.DeltaDiscoveryRequest) (*refusal, error) {
	if err := checkType(req.GetTypeUrl()); err != nil {
		return nil, err
	}
	subscribe, unsubscribe := req.GetResourceNamesSubscribe(), req.GetResourceNamesUnsubscribe()
	wanted, err := d.wanted.changed(subscribe, unsubscribe, !d.begun)
	if err != nil {
		return nil, err
	}
	have := req.GetInitialResourceVersions()
	if !d.begun {
		if err := checkNames(have); err != nil {
			return nil, err
		}
		d.begun, d.node, d.sent = true, nodeOf(req.GetNode()), map[string]version{}
		for name, v := range have {
			if v != absent && (wanted.all || wanted.has(name)) {
				d.sent[name] = v
			}
		}
	} else {
		// Who asks for what it has already gets it again.
		for _, name := range slices.Concat(unsubscribe, subscribe) {
			delete(d.sent, name)
		}
		for name := range d.sent {
			if !wanted.has(name) {
				delete(d.sent, name)
			}
		}
	}
	d.wanted = wanted
	refused, _ := d.nonces.answered(req.GetResponseNonce(), req.GetErrorDetail())
	return refused, nil
}

// respond is due when a resource is new to the client, has changed, or is gone, and when one that it asks for does not
// exist, which it is told once.
func (d *delta) respond(o *offer) (*discoveryv3.DeltaDiscoveryResponse, error) {
	if !d.begun {
		return nil, nil
	}
	resp := &discoveryv3.DeltaDiscoveryResponse{TypeUrl: secretType}
	next := make(map[string]version, len(d.sent))
	for _, name := range d.wanted.names(o) {
		had, told := d.sent[name]
		r, ok := o.find(name)
		if !ok {
			if !told || had != absent {
				resp.RemovedResources = append(resp.RemovedResources, name)
			}
			next[name] = absent
			continue
		}
		next[name] = r.version
		if had == r.version {
			continue
		}
		packed, err := r.pack()
		if err != nil {
			return nil, err
		}
		resp.Resources = append(resp.Resources, &discoveryv3.Resource{Name: name, Version: r.version, Resource: packed})
	}
	// What only the wildcard covers is gone when nothing names it any more.
	for name, had := range d.sent {
		if _, still := next[name]; !still && had != absent {
			resp.RemovedResources = append(resp.RemovedResources, name)
		}
	}
	if len(resp.Resources) == 0 && len(resp.RemovedResources) == 0 {
		return nil, nil
	}
	slices.Sort(resp.RemovedResources)
	d.sent = next
	resp.Nonce = d.nonces.next()
	return resp, nil
}
