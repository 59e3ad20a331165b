#!lua name=loraq_VERSION
--[[
Every change of a job's state happens here, one function at a time, with the server's clock.

Keys (one hash tag, so that a cluster keeps them on one node; T = milliseconds since the epoch)
  {loraq}:job:<id>            hash    the record, fields below
  {loraq}:job:<id>:then       set     jobs that wait for its success
  {loraq}:job:<id>:finally    set     jobs that wait for its end
  {loraq}:job:<id>:history    list    ended attempts, JSON, oldest first
  {loraq}:job:<id>:events     stream  progress and log lines of all attempts, trimmed
  {loraq}:batch:<name>        hash    key (of its submit), owner, submitted_at T, trials, base_model, jobs (JSON list of ids),
                                      ended_at (T of its report's end), told (JSON: who was told of that; jobqueue/notification.py)
  {loraq}:to_tell             zset    batches that have ended, by the T from which somebody is to be told
  {loraq}:submits             hash    key of a submit -> the batch that it made
  {loraq}:batches             zset    names by submission T
  {loraq}:archived            zset    names of batches that are in the storage alone, by the T at which they went there
  {loraq}:queue:<q>:<owner>   zset    queued jobs of an owner in a memory class; for those who look, `waiting` and `held` are two more
  {loraq}:owners:<q>          set     owners that have a job in that class
  {loraq}:queues              set     classes that have ever held a job
  {loraq}:since:<q>           zset    jobs that can be claimed in a memory class, by the T since which they can
  {loraq}:delayed             zset    queued jobs that may not be claimed before T
  {loraq}:running             zset    running jobs by the time, on the clock of leases, at which theirs ends
  {loraq}:live                hash    "<kind> <state>" -> how many jobs, of those that have not ended; see `enter`
  {loraq}:totals              hash    what has ever happened, counted; see `count`
  {loraq}:ended               zset    ends of jobs lately, "<kind> <state> <seconds> <id>:<attempt> <owner>", by their T
  {loraq}:leases              zset    lengths of leases in ms, by the T at which a worker last asked for one
  {loraq}:strides             zset    twice the times between sweeps in ms, by the T of the last such sweep
  {loraq}:claims              hash    nonce of a claim -> the job that runs by it
  {loraq}:held_classes        set     memory classes of which nothing is claimed
  {loraq}:drained             set     workers, by host/device#mark or host/device, and hosts, that claim nothing
  {loraq}:unsized             set     jobs whose memory a control worker must estimate
  {loraq}:peaks               hash    kind of job -> its peak as measured over the estimate
  {loraq}:usage               hash    owner -> "<GPU seconds, decayed>:<T of that figure>"
  {loraq}:workers             hash    host/device#mark -> JSON as it described itself, with seen_at T
  {loraq}:gpu_workers         zset    GPU workers by the T of their last heartbeat
  {loraq}:sequence            number  first come, first served
  {loraq}:lease_clock         hash    seen_at T, time (of that clock), stride in ms, run_id of the server, quiet_until (time)

Fields of a record
  id kind batch("": a base model's evaluation, a question, a preview) trial owner spec(JSON) device(auto gpu cpu control) priority seq queue need(bytes, 0 unknown) waits(jobs and estimates to come)
  needs follows(JSON: jobs that must have succeeded, or ended, before)
  state(waiting held queued running succeeded failed cancelled) cancel("1" asked for) hold("1" not to be claimed)
  attempt(the fence) nonce(proof of the claim) lease(ms, as it was claimed) settled(number, nonce and state of the last settled attempt) failures
  rung(of the job's ladder of splits, where the next attempt begins; grows when memory ran out)
  submission(of the submit that made it, random) said(entries of its stream that the attempt has appended)
  kept_by(the worker that runs empty for it) kept_until(T) kept_since(T) kept_turns(how often another took that over)
  submitted_at queued_at claimed_at ended_at not_before (T) worker reason message progress(JSON) outcome(JSON)
]]

local P = '{loraq}:'
local LEASE_CLOCK = P .. 'lease_clock'
local HALF_LIFE = 24 * 3600 * 1000 -- of GPU seconds in the fair share
local PAGE, LOOK = 16, 1024 -- how many jobs of an owner and class a claim reads at once, and looks at in all
local PATIENCE = 60 * 1000 -- a job that has waited for longer lets no other overtake it where it would fit
local RESERVED = 15 * 1000 -- how long a device is kept free for a job that waits, since it last asked
local TURN = 10 * 60 * 1000 -- after which another device may be kept free instead; the next turn is half as long again
local MOST_CORRECTION = 2 -- of an estimate: what is further off is something else than its constants
local GPU_ALIVE = 30 * 1000 -- a GPU worker that has been silent for longer does not keep CPU workers away
local ANSWERS_KEPT = 24 * 3600 * 1000 -- after their end
local LATELY = 3600 * 1000
local FORGET = 24 * 3600 * 1000 -- of silent workers
local STRIDE = 4 * 1000 -- of the clock of leases, until a sweep has said otherwise
local WAITS = { 1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 24 * 3600 } -- buckets of histograms, in seconds
local DURATIONS = { 5, 15, 60, 300, 900, 1800, 3600, 2 * 3600, 4 * 3600, 8 * 3600, 24 * 3600 }
local SOON_FORGOTTEN = { ask = true, preview = true }
local FINAL = { succeeded = true, failed = true, cancelled = true }

local function key(id) return P .. 'job:' .. id end
local function field(id, name) return redis.call('HGET', key(id), name) end
local function number(id, name) return tonumber(field(id, name) or '') or 0 end
-- Of host/device#mark.
local function name_of(worker) return string.match(worker, '^[^#]*') end
local function host_of(worker) return string.match(worker, '^[^/]*') end
local function time()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local function map(hash)
  local flat, found = redis.call('HGETALL', P .. hash), {}
  for i = 1, #flat, 2 do found[flat[i]] = flat[i + 1] end
  return found
end

-- Counters for monitors, "<what>:<label>:..." -> number. They last as long as the server's data, whoever restarts.
local function count(by, ...) redis.call('HINCRBY', P .. 'totals', table.concat({ ... }, ':'), by) end

-- Into the bucket of a histogram, `bounds` in seconds; the last has no bound.
local function observe(ms, bounds, ...)
  local bucket = 'inf'
  for i = #bounds, 1, -1 do
    if ms <= bounds[i] * 1000 then bucket = bounds[i] end
  end
  local name = table.concat({ ... }, ':')
  count(1, name, bucket)
  count(math.max(0, ms), name, 'ms')
end

-- A job's next state. Nothing else writes it, so that each job is counted where it is.
local function enter(id, state)
  local kind, before = unpack(redis.call('HMGET', key(id), 'kind', 'state'))
  if before and not FINAL[before] then redis.call('HINCRBY', P .. 'live', kind .. ' ' .. before, -1) end
  if FINAL[state] then
    count(1, 'ended', kind, state)
  else
    redis.call('HINCRBY', P .. 'live', kind .. ' ' .. state, 1)
  end
  redis.call('HSET', key(id), 'state', state)
end

-- A command that its sender has given up may lie in a stopped server's socket: it must not be carried out afterwards.
local function too_late(not_after) return time() > tonumber(not_after) end

-- A function that clients call, with the time after which they will have given it up before its other arguments.
local function in_time(callback)
  return function(keys, args)
    if too_late(table.remove(args, 1)) then return redis.error_reply('TOOLATE') end
    return callback(keys, args)
  end
end

-- The classes in which something became claimable, each as often as there is work, but no more than tokens may lie there.
local MAX_TOKENS = 64
local function nobody() return { count = {}, list = {} } end
local function wake(woken, queue)
  if not queue then return end
  local count = (woken.count[queue] or 0) + 1
  woken.count[queue] = count
  if count <= MAX_TOKENS then woken.list[#woken.list + 1] = queue end
end
local function answer(first, woken)
  table.insert(woken.list, 1, first)
  return woken.list
end

-- The ids that a call has changed, then the classes that woke behind a "|".
local function both(ids, woken)
  ids[#ids + 1] = '|'
  for _, queue in ipairs(woken.list) do ids[#ids + 1] = queue end
  return ids
end

-- A clock that went back: whoever is silent would pass for alive for as much longer, and delays would last longer.
local function went_back(by)
  for _, name in ipairs({ 'delayed', 'to_tell', 'gpu_workers' }) do
    for _, member in ipairs(redis.call('ZRANGE', P .. name, 0, -1)) do redis.call('ZINCRBY', P .. name, -by, member) end
  end
end

-- The clock of leases: TIME without its jumps. From one look to the next it goes on by a stride at most, twice the time
-- between sweeps, and never back. So nothing counts in which nobody could renew: a jump, a server that stood still, hours
-- without any worker. A jump may still count as one stride. So the second answer is the time before which a lease must
-- have ended to be taken back.
local function lease_time()
  local now = time()
  local seen, ours, stride = unpack(redis.call('HMGET', LEASE_CLOCK, 'seen_at', 'time', 'stride'))
  seen, stride = tonumber(seen or now), tonumber(stride or STRIDE)
  if now < seen - 1000 then went_back(seen - now) end
  ours = (ours or now) + math.min(math.max(0, now - seen), stride)
  redis.call('HSET', LEASE_CLOCK, 'seen_at', now, 'time', ours)
  return ours, ours - stride
end

-- That of whoever sweeps least often: else one could take back early what another has counted.
local function set_stride(stride, now)
  redis.call('ZADD', P .. 'strides', now, stride)
  for _, other in ipairs(redis.call('ZRANGE', P .. 'strides', 0, -1)) do stride = math.max(stride, other) end
  redis.call('HSET', LEASE_CLOCK, 'stride', stride)
end

-- The attempt's lease begins anew; each has its own length, as hosts may be set up otherwise.
local function extend(id, lease)
  redis.call('ZADD', P .. 'running', lease_time() + lease, id)
  redis.call('ZADD', P .. 'leases', time(), lease)
end

-- After another server process, which may have lost its last second, nothing is taken from anyone, and nothing given, for
-- the longest lease of all: somebody may be at work by a claim that was lost, and finds out when he renews.
local function quiet(now, over)
  local run_id = string.match(redis.call('INFO', 'server'), 'run_id:(%w+)')
  local known, till = unpack(redis.call('HMGET', LEASE_CLOCK, 'run_id', 'quiet_until'))
  till = tonumber(till or 0)
  if known and known ~= run_id then
    for _, lease in ipairs(redis.call('ZRANGE', P .. 'leases', 0, -1)) do till = math.max(till, now + lease) end
  end
  redis.call('HSET', LEASE_CLOCK, 'run_id', run_id, 'quiet_until', till)
  return over < till
end

-- For how many ms more `quiet` will be true; for a look, which changes nothing.
local function quiet_for(now)
  local seen, ours, stride, till = unpack(redis.call('HMGET', LEASE_CLOCK, 'seen_at', 'time', 'stride', 'quiet_until'))
  if not (ours and till) then return 0 end
  return math.max(0, till - ours - math.min(math.max(0, now - (seen or now)), tonumber(stride or STRIDE)))
end

-- Into a queue, in the order of priority (higher first), then of submission.
local function place(id, queue)
  local owner, priority, seq = unpack(redis.call('HMGET', key(id), 'owner', 'priority', 'seq'))
  redis.call('ZADD', P .. 'queue:' .. queue .. ':' .. owner, -priority * 2 ^ 43 + seq, id)
  redis.call('SADD', P .. 'owners:' .. queue, owner)
end

-- The class of a queued job, and the T since which it can be claimed.
local function claimable(id)
  local queue, queued_at, not_before = unpack(redis.call('HMGET', key(id), 'queue', 'queued_at', 'not_before'))
  return queue, math.max(queued_at, not_before)
end

-- Into its class, from where it can be claimed.
local function offer(id)
  local queue, since = claimable(id)
  place(id, queue)
  redis.call('ZADD', P .. 'since:' .. queue, since, id)
  redis.call('SADD', P .. 'queues', queue)
  return queue
end

-- Out of whichever queue it is in.
local function unplace(id)
  local queue, owner = unpack(redis.call('HMGET', key(id), 'queue', 'owner'))
  for _, name in ipairs({ queue, 'waiting', 'held' }) do
    redis.call('ZREM', P .. 'queue:' .. name .. ':' .. owner, id)
  end
  redis.call('ZREM', P .. 'since:' .. queue, id)
  redis.call('ZREM', P .. 'delayed', id)
end

-- Queued, now or from `not_before` on, or held. Returns the class to wake, or nil.
local function enqueue(id, now, not_before)
  unplace(id)
  if field(id, 'hold') == '1' then
    enter(id, 'held')
    redis.call('HSET', key(id), 'not_before', not_before)
    place(id, 'held')
    return nil
  end
  enter(id, 'queued')
  redis.call('HSET', key(id), 'queued_at', now, 'not_before', not_before)
  if not_before > now then
    redis.call('ZADD', P .. 'delayed', not_before, id)
    return nil
  end
  return offer(id)
end

-- One thing less to wait for.
local function arrived(id, now, woken)
  local state = field(id, 'state')
  if not state then return end -- it was removed meanwhile
  if redis.call('HINCRBY', key(id), 'waits', -1) <= 0 and state == 'waiting' then
    wake(woken, enqueue(id, now, 0))
  end
end

local function event(id, kind, body)
  redis.call('XADD', key(id) .. ':events', 'MAXLEN', '~', 20000, '*', 'kind', kind, 'attempt', number(id, 'attempt'),
    'body', body)
end

-- The end of a job, and what it means for those that waited for it.
local function finish(id, now, state, reason, message, woken)
  unplace(id)
  enter(id, state)
  redis.call('HSET', key(id), 'ended_at', now, 'reason', reason, 'message', message)
  redis.call('SREM', P .. 'unsized', id)
  local kind, owner, claimed, batch = unpack(redis.call('HMGET', key(id), 'kind', 'owner', 'claimed_at', 'batch'))
  local took = claimed == '0' and 0 or (now - claimed) / 1000
  redis.call('ZADD', P .. 'ended', now, table.concat({ kind, state, took, id .. ':' .. number(id, 'attempt'), owner }, ' '))
  event(id, 'state', reason == '' and state or (state .. ': ' .. reason .. ': ' .. message))
  for _, other in ipairs(redis.call('SMEMBERS', key(id) .. ':then')) do
    if state == 'succeeded' then
      arrived(other, now, woken)
    elseif field(other, 'state') == 'waiting' then
      finish(other, now, 'cancelled', 'dependency', id .. ' ' .. state, woken)
    end
  end
  for _, other in ipairs(redis.call('SMEMBERS', key(id) .. ':finally')) do
    arrived(other, now, woken)
  end
  redis.call('DEL', key(id) .. ':then', key(id) .. ':finally')
  if kind == 'report' and redis.call('EXISTS', P .. 'batch:' .. batch) == 1 then -- the last of its batch
    redis.call('HSET', P .. 'batch:' .. batch, 'ended_at', now, 'told', '')
    redis.call('ZADD', P .. 'to_tell', now, batch)
  end
  if SOON_FORGOTTEN[kind] then -- it is of no batch, with which it would go
    for _, part in ipairs({ '', ':history', ':events' }) do redis.call('PEXPIRE', key(id) .. part, ANSWERS_KEPT) end
  end
end

-- Waiting for what it needs and follows, as far as that has not ended; queued where there is nothing to wait for.
local function begin(id, needs, follows, now, woken)
  local waits = 1 -- for the end of this function
  if field(id, 'queue') == '' then
    redis.call('SADD', P .. 'unsized', id)
    waits = waits + 1
  end
  for kind, others in pairs({ ['then'] = needs, finally = follows }) do
    for _, other in ipairs(others) do
      if not FINAL[field(other, 'state')] then
        redis.call('SADD', key(other) .. ':' .. kind, id)
        waits = waits + 1
      end
    end
  end
  enter(id, 'waiting')
  redis.call('HSET', key(id), 'waits', waits)
  place(id, 'waiting')
  arrived(id, now, woken)
end

local function add(job, now, woken)
  local id, state = job.id, field(job.id, 'state')
  if state and state ~= 'failed' and state ~= 'cancelled' then -- a base evaluation that is there already
    redis.call('HSET', key(id), 'cancel', '') -- and is wanted again, if it was not; see `settle`
    return
  end
  redis.call('HSET', key(id), 'id', id, 'kind', job.kind, 'batch', job.batch, 'trial', job.trial, 'owner', job.owner,
    'spec', job.spec, 'submission', job.submission, 'device', job.device, 'priority', job.priority, 'queue', job.queue, 'need', job.need, 'hold', '',
    'needs', cjson.encode(job.needs), 'follows', cjson.encode(job.follows),
    'failures', 0, 'rung', 0, 'submitted_at', now, 'ended_at', 0, 'claimed_at', 0, 'cancel', '', 'reason', '', 'message', '',
    'progress', '', 'outcome', '', 'seq', redis.call('INCR', P .. 'sequence'))
  redis.call('HSETNX', key(id), 'attempt', 0)
  begin(id, job.needs, job.follows, now, woken)
end

-- submit(key, name, owner, trials, base_model, jobs JSON, ids JSON)
--   -> {1, classes...}, {0} where the name is taken, {2, batch} where the key is known
local function submit(_, args)
  local submit_key, name, owner, trials, base_model, jobs, ids = unpack(args)
  local batch, now, woken = P .. 'batch:' .. name, time(), nobody()
  local known = redis.call('HGET', P .. 'submits', submit_key)
  if known then
    redis.call('HSET', P .. 'submits', submit_key, known) -- a write: its sender will ask whether all before it is on disk
    return { 2, known }
  end
  if redis.call('EXISTS', batch) == 1 or redis.call('ZSCORE', P .. 'archived', name) then return { 0 } end
  redis.call('HSET', P .. 'submits', submit_key, name)
  redis.call('HSET', batch, 'key', submit_key, 'owner', owner, 'submitted_at', now, 'trials', trials, 'base_model', base_model, 'jobs', ids)
  redis.call('ZADD', P .. 'batches', now, name)
  for _, job in ipairs(cjson.decode(jobs)) do add(job, now, woken) end
  return answer(1, woken)
end

-- ask(job JSON): a job of no batch, a question or a preview -> classes
local function ask(_, args)
  local woken = nobody()
  add(cjson.decode(args[1]), time(), woken)
  return woken.list
end

-- size(id, need, class): the estimate that an unsized job waited for -> classes
local function size(_, args)
  local id, need, queue = unpack(args)
  local woken = nobody()
  if redis.call('SREM', P .. 'unsized', id) == 1 then
    redis.call('HSET', key(id), 'need', need, 'queue', queue)
    arrived(id, time(), woken)
  end
  return woken.list
end

-- refuse(id, reason, message): a waiting job can never run -> classes
local function refuse(_, args)
  local id, reason, message = unpack(args)
  local woken = nobody()
  if field(id, 'state') == 'waiting' then finish(id, time(), 'failed', reason, message, woken) end
  return woken.list
end

-- Marked by what no other worker has, by its name, or by its host's.
local function drained(worker)
  local marks = 0
  for _, name in ipairs({ worker, name_of(worker), host_of(worker) }) do
    marks = marks + redis.call('SISMEMBER', P .. 'drained', name)
  end
  return marks
end

local function usage(owner, now)
  local value, at = string.match(redis.call('HGET', P .. 'usage', owner) or '', '([^:]+):([^:]+)')
  return value and value * 0.5 ^ (math.max(0, now - at) / HALF_LIFE) or 0
end

-- The classes that a worker may serve. A CPU worker takes what was meant for GPUs where no GPU worker lives.
local function served(device, queues, now)
  if device ~= 'cpu' or redis.call('ZCOUNT', P .. 'gpu_workers', now - GPU_ALIVE, '+inf') > 0 then return queues end
  local all = {}
  for _, queue in ipairs(redis.call('SMEMBERS', P .. 'queues')) do
    if queue ~= 'control' and queue ~= 'preview' then all[#all + 1] = queue end
  end
  return all
end

-- Whether a is to be served before b: priority, then the owner that used least, then first come.
local function before(a, b)
  if a.priority ~= b.priority then return a.priority > b.priority end
  if a.usage ~= b.usage then return a.usage < b.usage end
  return a.seq < b.seq
end

-- Whether this worker may run empty for the job: no other does, or one that did not get empty in its turn. Turns grow, so
-- that at last one is as long as the jobs that have to end.
local function keeps(id, worker, now)
  local by, til, since, turns = unpack(redis.call('HMGET', key(id), 'kept_by', 'kept_until', 'kept_since', 'kept_turns'))
  return not by or by == worker or tonumber(til) < now or now - (since or 0) > TURN * 1.5 ^ (turns or 0)
end

local function keep(id, worker, now)
  local by = field(id, 'kept_by')
  if by ~= worker then
    redis.call('HSET', key(id), 'kept_by', worker, 'kept_since', now)
    redis.call('HINCRBY', key(id), 'kept_turns', by and 1 or 0)
  end
  redis.call('HSET', key(id), 'kept_until', now + RESERVED)
end

-- The first job of that owner and class which the worker may and can hold; for a CPU worker none that wants a GPU.
-- One that has waited for long, and would fit if nothing else ran here, is `blocked`: nothing behind it may overtake it,
-- on one device only.
local function first_fit(queue, owner, worker, device, free, whole, now)
  local list = P .. 'queue:' .. queue .. ':' .. owner
  for start = 0, LOOK - PAGE, PAGE do
    local ids = redis.call('ZRANGE', list, start, start + PAGE - 1)
    if start == 0 and #ids == 0 then redis.call('SREM', P .. 'owners:' .. queue, owner) end
    for _, id in ipairs(ids) do
      local need, priority, seq, meant, queued_at =
        unpack(redis.call('HMGET', key(id), 'need', 'priority', 'seq', 'device', 'queued_at'))
      need = tonumber(need)
      if not need then -- evicted, by a server that may do that
        redis.call('ZREM', list, id)
        redis.call('ZREM', P .. 'since:' .. queue, id)
      elseif not (device == 'cpu' and meant == 'gpu') then
        local blocked = need > free and need <= whole and now - queued_at > PATIENCE and keeps(id, worker, now)
        if need <= free or blocked then
          return { id = id, priority = tonumber(priority), seq = tonumber(seq), blocked = blocked }
        end
      end
    end
    if #ids < PAGE then return nil end
  end
end

local function best(worker, device, free, whole, queues, now)
  local chosen
  for _, queue in ipairs(served(device, queues, now)) do
    local held = redis.call('SISMEMBER', P .. 'held_classes', queue) == 1
    for _, owner in ipairs(held and {} or redis.call('SMEMBERS', P .. 'owners:' .. queue)) do
      local candidate = first_fit(queue, owner, worker, device, free, whole, now)
      if candidate then
        candidate.usage = usage(owner, now)
        if not chosen or before(candidate, chosen) then chosen = candidate end
      end
    end
  end
  if not chosen or not chosen.blocked then return chosen and chosen.id end
  keep(chosen.id, worker, now)
end

-- claim(not after, worker, device gpu|cpu|control, free bytes, bytes if nothing ran there, lease, nonce, class...)
--   -> {id, attempt, spec, batch, failures, submission, need, rung} or {}
-- Asked again with the nonce of a claim that runs, since no answer came, it renews that claim and answers alike.
local function claim(_, args)
  local not_after, worker, device, free, whole, lease, nonce = unpack(args, 1, 7)
  local now = time()
  if too_late(not_after) then return {} end
  redis.call('ZADD', P .. 'leases', now, lease)
  local id = redis.call('HGET', P .. 'claims', nonce)
  if not id then
    if drained(worker) > 0 or quiet(lease_time()) then return {} end
    id = best(worker, device, tonumber(free), tonumber(whole), { unpack(args, 8) }, now)
    if not id then return {} end
    local queue, since = claimable(id)
    observe(now - since, WAITS, 'wait', queue)
    unplace(id)
    redis.call('HDEL', key(id), 'kept_by', 'kept_until', 'kept_since', 'kept_turns')
    redis.call('HINCRBY', key(id), 'attempt', 1)
    enter(id, 'running')
    redis.call('HSET', key(id), 'nonce', nonce, 'lease', lease, 'worker', worker, 'claimed_at', now, 'ended_at', 0,
      'cancel', '', 'progress', '', 'reason', '', 'message', '', 'said', 0)
    redis.call('HSET', P .. 'claims', nonce, id)
    event(id, 'state', 'running on ' .. name_of(worker))
  end
  extend(id, lease)
  local spec, batch, submission = unpack(redis.call('HMGET', key(id), 'spec', 'batch', 'submission'))
  return { id, number(id, 'attempt'), spec, batch, number(id, 'failures'), submission, number(id, 'need'), number(id, 'rung') }
end

local function runs_no_more(id)
  redis.call('ZREM', P .. 'running', id)
  redis.call('HDEL', P .. 'claims', field(id, 'nonce') or '')
end

-- Whether this attempt still owns its job.
local function owns(id, attempt, nonce)
  local state, now_attempt, now_nonce = unpack(redis.call('HMGET', key(id), 'state', 'attempt', 'nonce'))
  return state == 'running' and now_attempt == attempt and now_nonce == nonce
end

-- renew(id, attempt, nonce) -> 0 not yours, 1 renewed, 2 renewed and asked to cancel
local function renew(_, args)
  local id, attempt, nonce = unpack(args)
  if not owns(id, attempt, nonce) then return 0 end
  extend(id, number(id, 'lease'))
  return field(id, 'cancel') == '1' and 2 or 1
end

-- append(id, attempt, nonce, keep, number of the first entry, kind, body, kind, body, ...) -> 0 not yours, 1 appended
-- The attempt numbers its entries from 0: what is sent again, since no answer came, is not written again.
local function append(_, args)
  local id, attempt, nonce, keep, first = unpack(args, 1, 5)
  if not owns(id, attempt, nonce) then return 0 end
  local said = number(id, 'said')
  for i = 6 + 2 * math.max(0, said - first), #args, 2 do
    redis.call('XADD', key(id) .. ':events', 'MAXLEN', '~', keep, '*', 'kind', args[i], 'attempt', attempt,
      'body', args[i + 1])
    if args[i] == 'progress' then redis.call('HSET', key(id), 'progress', args[i + 1]) end
  end
  redis.call('HSET', key(id), 'said', math.max(said, first + (#args - 5) / 2))
  return 1
end

-- settle(id, attempt, nonce, state, reason, message, outcome, delay, counts, rung, need, class, tokens, "expired" or "")
--   -> {1, classes...} or {0}
-- state `queued` means: again, after `delay` ms; `counts` "1": as one more failure. "expired": only if the lease ended.
-- After `out_of_memory` the next attempt begins at `rung`, and its job needs `need` (0: what it did) and so waits in `class`.
-- `tokens` that a training has trained, in all its attempts. Said twice by the same attempt it is done once and answered alike.
local function settle(_, args)
  local id, attempt, nonce, state, reason, message, outcome, delay, counts, rung, need, queue, tokens, only = unpack(args)
  local now, woken, word = time(), nobody(), attempt .. ' ' .. nonce .. ' ' .. state
  if field(id, 'settled') == word then return { 1 } end
  if not owns(id, attempt, nonce) then return { 0 } end
  if only == 'expired' and tonumber(redis.call('ZSCORE', P .. 'running', id)) > select(2, lease_time()) then return { 0 } end
  local asked = field(id, 'cancel') == '1'
  if asked and state == 'queued' then state, reason, message = 'cancelled', '', 'on request' end
  if not asked and state == 'cancelled' then state, message = 'queued', 'wanted again' end -- by a batch that came since
  local owner, claimed, worker, kind = unpack(redis.call('HMGET', key(id), 'owner', 'claimed_at', 'worker', 'kind'))
  runs_no_more(id)
  redis.call('HSET', P .. 'usage', owner, (usage(owner, now) + (now - claimed) / 1000) .. ':' .. now)
  redis.call('RPUSH', key(id) .. ':history', cjson.encode({ attempt = tonumber(attempt), worker = name_of(worker),
    claimed_at = claimed / 1000, ended_at = now / 1000, state = state, reason = reason, message = message }))
  redis.call('HSET', key(id), 'settled', word, 'ended_at', now, 'outcome', outcome)
  count(1, 'attempt', kind, state, reason)
  observe(now - claimed, DURATIONS, 'took', kind, state)
  if state == 'succeeded' and tokens ~= '0' then count(tokens, 'tokens') end
  if reason == 'out_of_memory' then
    count(1, 'memory', kind, state == 'queued' and (need ~= '0' and 'more_memory' or 'smaller') or 'none')
  end
  if counts == '1' then redis.call('HINCRBY', key(id), 'failures', 1) end
  if state == 'queued' and reason == 'out_of_memory' then
    redis.call('HSET', key(id), 'rung', rung)
    if need ~= '0' then redis.call('HSET', key(id), 'need', need, 'queue', queue) end
  end
  if state == 'queued' then
    redis.call('HSET', key(id), 'reason', reason, 'message', message)
    event(id, 'state', 'queued again: ' .. reason .. ': ' .. message)
    wake(woken, enqueue(id, now, delay == '0' and 0 or now + delay))
  else
    finish(id, now, state, reason, message, woken)
  end
  return answer(1, woken)
end

-- learn(kind, ratio) -> 1: what a job of that kind was measured to take, over what it was thought to
-- It grows at once and falls slowly: a little too much is waste, a little too little a failed attempt.
local function learn(_, args)
  local kind, ratio = args[1], math.min(math.max(tonumber(args[2]), 1 / MOST_CORRECTION), MOST_CORRECTION)
  local known = tonumber(redis.call('HGET', P .. 'peaks', kind) or '')
  redis.call('HSET', P .. 'peaks', kind, tostring(known and math.max(ratio, 0.75 * known + 0.25 * ratio) or ratio))
  return 1
end

-- cancel(id...) -> the ids that it stopped or asked to stop, then the classes that woke behind a "|"
local function cancel(_, ids)
  local now, asked, woken = time(), {}, nobody()
  for _, id in ipairs(ids) do
    local state = field(id, 'state')
    if state == 'running' then
      redis.call('HSET', key(id), 'cancel', '1')
      asked[#asked + 1] = id
    elseif state == 'queued' or state == 'waiting' or state == 'held' then
      finish(id, now, 'cancelled', '', 'on request', woken)
      asked[#asked + 1] = id
    end
  end
  return both(asked, woken)
end

-- hold(id...) and release(id...) -> the ids that it changed, then the classes that woke behind a "|"
-- A running job goes on; it is held should it come back into the queue.
local function hold(_, ids)
  local changed = {}
  for _, id in ipairs(ids) do
    local state = field(id, 'state')
    if state and not FINAL[state] and field(id, 'hold') ~= '1' then
      redis.call('HSET', key(id), 'hold', '1')
      if state == 'queued' then
        unplace(id)
        enter(id, 'held')
        place(id, 'held')
      end
      changed[#changed + 1] = id
    end
  end
  return both(changed, nobody())
end

local function release(_, ids)
  local now, changed, woken = time(), {}, nobody()
  for _, id in ipairs(ids) do
    if field(id, 'hold') == '1' then
      redis.call('HSET', key(id), 'hold', '')
      if field(id, 'state') == 'held' then wake(woken, enqueue(id, now, number(id, 'not_before'))) end
      changed[#changed + 1] = id
    end
  end
  return both(changed, woken)
end

-- retry(id...) -> as release: what failed or was cancelled begins again, each after those that it waits for; checkpoints are
-- theirs still. What has succeeded is left, but for what sums up the others.
local function retry(_, ids)
  local now, changed, woken = time(), {}, nobody()
  for _, id in ipairs(ids) do
    local state, kind = field(id, 'state'), field(id, 'kind')
    local early = kind == 'report' or kind == 'judge' -- it would not see what is run again, even if it runs by now
    if early then
      unplace(id)
      runs_no_more(id)
    end
    if kind == 'report' then
      local batch = field(id, 'batch')
      redis.call('ZREM', P .. 'to_tell', batch)
      redis.call('HDEL', P .. 'batch:' .. batch, 'ended_at', 'told')
    end
    local failed = state == 'failed' or state == 'cancelled'
    if early or failed and not SOON_FORGOTTEN[kind] then
      if FINAL[state] then redis.call('HSET', key(id), 'hold', '') end
      enter(id, 'waiting')
      redis.call('HSET', key(id), 'failures', 0, 'rung', 0, 'ended_at', 0, 'claimed_at', 0, 'cancel', '', 'reason', '',
        'message', '', 'progress', '', 'outcome', '')
      event(id, 'state', 'to be run again, on request')
      changed[#changed + 1] = id
    end
  end
  for _, id in ipairs(changed) do
    begin(id, cjson.decode(field(id, 'needs')), cjson.decode(field(id, 'follows')), now, woken)
  end
  return both(changed, woken)
end

-- The jobs of an ended batch: its own, and base models' evaluations; or nil and why: 0 it is not there, -1 it goes on.
local function ended(name)
  local ids = redis.call('HGET', P .. 'batch:' .. name, 'jobs')
  if not ids then return nil, 0 end
  local own, others = {}, {}
  for _, id in ipairs(cjson.decode(ids)) do
    local list = string.sub(id, 1, #name + 1) == name .. '.' and own or others
    list[#list + 1] = id
  end
  for _, id in ipairs(own) do
    if not FINAL[field(id, 'state')] then return nil, -1 end
  end
  return own, others
end

local function forget(name, own)
  for _, id in ipairs(own) do
    -- A base model's evaluation may go on for others: its end is not to be told to a later batch of this name.
    for kind, others in pairs({ ['then'] = 'needs', finally = 'follows' }) do
      for _, other in ipairs(cjson.decode(field(id, others))) do redis.call('SREM', key(other) .. ':' .. kind, id) end
    end
    redis.call('DEL', key(id), key(id) .. ':then', key(id) .. ':finally', key(id) .. ':history', key(id) .. ':events')
  end
  redis.call('HDEL', P .. 'submits', redis.call('HGET', P .. 'batch:' .. name, 'key'))
  redis.call('DEL', P .. 'batch:' .. name)
  redis.call('ZREM', P .. 'batches', name)
  redis.call('ZREM', P .. 'to_tell', name)
end

-- remove(name): forgets an ended batch and its own jobs, or that it was archived
--   -> 1, 0 where there is none, -1 where a job has not ended
local function remove(_, args)
  local name = args[1]
  local own, why = ended(name)
  if own then
    forget(name, own)
    return 1
  end
  return why == 0 and redis.call('ZREM', P .. 'archived', name) or why
end

-- archive(name, seen): as remove, of a batch that was written to the storage; its name stays taken
-- `seen` is what was written: "<attempt>:<ended_at>" of each of its own jobs, a space between.
--   -> 1, 2 where it was archived before, 0 where there is none, -1 where a job has not ended, or has been at work since
local function archive(_, args)
  local name, seen = unpack(args)
  local own, others = ended(name)
  if not own then return others == 0 and redis.call('ZSCORE', P .. 'archived', name) and 2 or others end
  local now, last = {}, 0
  for i, id in ipairs(own) do
    local attempt, ended_at = unpack(redis.call('HMGET', key(id), 'attempt', 'ended_at'))
    now[i], last = attempt .. ':' .. ended_at, math.max(last, tonumber(ended_at))
  end
  if table.concat(now, ' ') ~= seen then return -1 end
  -- Base models' evaluations stay, to be compared with, without what they have printed: log.txt in the storage has it.
  for _, id in ipairs(others) do
    if FINAL[field(id, 'state')] and number(id, 'ended_at') <= last then redis.call('DEL', key(id) .. ':events') end
  end
  forget(name, own)
  redis.call('ZADD', P .. 'archived', time(), name)
  return 1
end

-- mark(set, "add" or "remove", member): a class is held, or a worker or host drained, or no longer
local function mark(_, args)
  return redis.call(args[2] == 'add' and 'SADD' or 'SREM', P .. args[1], args[3])
end

-- release_base(id): a batch no longer needs this evaluation of a base model; the last one to say so cancels it
local function release_base(keys, args)
  local id = args[1]
  for _, other in ipairs(redis.call('SMEMBERS', key(id) .. ':finally')) do
    if not FINAL[field(other, 'state')] then return { '|' } end
  end
  return cancel(keys, { id })
end

-- The lists of jobs that have not ended, {state, key} each.
local function lists()
  local found = { { 'running', P .. 'running' }, { 'queued', P .. 'delayed' } }
  for _, queue in ipairs({ 'waiting', 'held', unpack(redis.call('SMEMBERS', P .. 'queues')) }) do
    local state = (queue == 'waiting' or queue == 'held') and queue or 'queued'
    for _, owner in ipairs(redis.call('SMEMBERS', P .. 'owners:' .. queue)) do
      found[#found + 1] = { state, P .. 'queue:' .. queue .. ':' .. owner }
    end
  end
  return found
end

-- Where `live` differs from the lists, by an eviction or a release that counts otherwise, all is counted anew.
local function recount()
  local found, off = lists(), {}
  for _, list in ipairs(found) do off[list[1]] = (off[list[1]] or 0) + redis.call('ZCARD', list[2]) end
  for what, jobs in pairs(map('live')) do
    local state = string.match(what, '%S+$')
    off[state] = (off[state] or 0) - jobs
  end
  local right = true
  for _, jobs in pairs(off) do right = right and jobs == 0 end
  if right then return end
  redis.call('DEL', P .. 'live')
  for _, list in ipairs(found) do
    for _, id in ipairs(redis.call('ZRANGE', list[2], 0, -1)) do
      local kind = field(id, 'kind')
      if kind then
        redis.call('HINCRBY', P .. 'live', kind .. ' ' .. list[1], 1)
      else
        redis.call('ZREM', list[2], id)
      end
    end
  end
end

-- sweep(ms between sweeps) -> JSON {expired: [{id, attempt, nonce}], unsized: [id], queues: {class: jobs that can be claimed}}
local function sweep(_, args)
  local now, expired, queues = time(), {}, {}
  set_stride(2 * args[1], now)
  local leased, over = lease_time()
  if not quiet(leased, over) then
    for _, id in ipairs(redis.call('ZRANGE', P .. 'running', '-inf', over, 'BYSCORE', 'LIMIT', 0, 100)) do
      local attempt, nonce = unpack(redis.call('HMGET', key(id), 'attempt', 'nonce'))
      if attempt then
        expired[#expired + 1] = { id, attempt, nonce }
      else
        redis.call('ZREM', P .. 'running', id) -- evicted, by a server that may do that
      end
    end
  end
  for _, id in ipairs(redis.call('ZRANGE', P .. 'delayed', '-inf', now, 'BYSCORE', 'LIMIT', 0, 100)) do
    redis.call('ZREM', P .. 'delayed', id)
    if field(id, 'state') then offer(id) end
  end
  for _, queue in ipairs(redis.call('SMEMBERS', P .. 'queues')) do
    local jobs = 0
    for _, owner in ipairs(redis.call('SMEMBERS', P .. 'owners:' .. queue)) do
      jobs = jobs + redis.call('ZCARD', P .. 'queue:' .. queue .. ':' .. owner)
    end
    queues[#queues + 1] = { queue, jobs }
    local oldest = redis.call('ZRANGE', P .. 'since:' .. queue, 0, 0)[1]
    if oldest and field(oldest, 'state') ~= 'queued' then redis.call('ZREM', P .. 'since:' .. queue, oldest) end
  end
  recount()
  local workers = redis.call('HGETALL', P .. 'workers')
  for i = 1, #workers, 2 do
    if now - string.match(workers[i + 1], '^%d+') > FORGET then redis.call('HDEL', P .. 'workers', workers[i]) end
  end
  redis.call('ZREMRANGEBYSCORE', P .. 'gpu_workers', '-inf', now - FORGET)
  redis.call('ZREMRANGEBYSCORE', P .. 'ended', '-inf', now - LATELY)
  for _, name in ipairs({ 'leases', 'strides' }) do
    redis.call('ZREMRANGEBYSCORE', P .. name, '-inf', now - FORGET)
  end
  local unsized = redis.call('SRANDMEMBER', P .. 'unsized', 200)
  return cjson.encode({ expired = expired, unsized = unsized, queues = queues })
end

-- heartbeat(worker, device, JSON) -> above 0 where the worker is to drain; leave(worker); sweeps forget workers that have been silent for a day
local function heartbeat(_, args)
  local worker, device, info = unpack(args)
  local now = time()
  redis.call('HSET', P .. 'workers', worker, now .. ' ' .. info)
  if device == 'gpu' then redis.call('ZADD', P .. 'gpu_workers', now, worker) end
  return drained(worker)
end

local function leave(_, args) -- what it was to GPU_ALIVE it stays: it may be started again, and CPU workers need not begin
  redis.call('HDEL', P .. 'workers', args[1])
  return 1
end

-- What is shown of a job in a list: neither its spec nor what came of it, which are the most of a record.
local SHOWN = { 'id', 'kind', 'state', 'batch', 'trial', 'owner', 'priority', 'queue', 'need', 'attempt', 'failures',
  'submitted_at', 'queued_at', 'claimed_at', 'ended_at', 'not_before', 'worker', 'reason', 'message', 'cancel', 'waits',
  'hold', 'needs', 'progress' }

-- The first `most` of these jobs, those left out that are gone.
local function records(ids, most)
  local found = {}
  for i = 1, math.min(most, #ids) do
    local values, record = redis.call('HMGET', key(ids[i]), unpack(SHOWN)), {}
    for j, name in ipairs(SHOWN) do
      if values[j] ~= '' then record[name] = values[j] or nil end
    end
    if record.id then found[#found + 1] = record end
  end
  return found
end

-- Ids of what runs for that owner and on that host, worker by worker; and all that each worker runs.
local function running_ids(owner, host)
  local chosen, workers, busy = {}, {}, {}
  for _, id in ipairs(redis.call('ZRANGE', P .. 'running', 0, -1)) do
    local of, worker = unpack(redis.call('HMGET', key(id), 'owner', 'worker'))
    if worker then
      busy[worker] = busy[worker] or {}
      table.insert(busy[worker], id)
      if (owner == '' or of == owner) and (host == '' or worker == host or name_of(worker) == host or host_of(worker) == host) then
        chosen[#chosen + 1], workers[id] = id, worker
      end
    end
  end
  table.sort(chosen, function(a, b) return workers[a] .. ' ' .. a < workers[b] .. ' ' .. b end)
  return chosen, busy
end

-- Ids of the first `most` jobs of these queues, by priority and submission; how many there are, and how many in each.
local function queued_ids(queues, owner, most)
  local heads, ids, all, each = {}, {}, 0, {}
  for _, queue in ipairs(queues) do
    for _, of in ipairs(owner ~= '' and { owner } or redis.call('SMEMBERS', P .. 'owners:' .. queue)) do
      local list = P .. 'queue:' .. queue .. ':' .. of
      local count = redis.call('ZCARD', list)
      if count > 0 then all, each[queue] = all + count, (each[queue] or 0) + count end
      local found = most > 0 and redis.call('ZRANGE', list, 0, most - 1, 'WITHSCORES') or {}
      for i = 1, #found, 2 do heads[#heads + 1] = { id = found[i], score = tonumber(found[i + 1]) } end
    end
  end
  table.sort(heads, function(a, b) return a.score < b.score end)
  for i = 1, math.min(most, #heads) do ids[i] = heads[i].id end
  return ids, all, each
end

-- Ids of jobs that may not be claimed yet.
local function delayed_ids(owner)
  local ids = {}
  for _, id in ipairs(redis.call('ZRANGE', P .. 'delayed', 0, LOOK - 1)) do
    if owner == '' or field(id, 'owner') == owner then ids[#ids + 1] = id end
  end
  return ids
end

-- How many jobs of each kind have ended lately and how, of the newest; and the seconds that their last attempts took
-- together: {{kind, state, count, seconds}}
local function ended_lately(owner, now)
  local found, list = {}, {}
  for _, word in ipairs(redis.call('ZRANGE', P .. 'ended', now, now - LATELY, 'BYSCORE', 'REV', 'LIMIT', 0, LOOK)) do
    local kind, state, seconds, of = string.match(word, '^(%S+) (%S+) (%S+) %S+ (.*)$')
    if owner == '' or of == owner then
      local name = kind .. ' ' .. state
      if not found[name] then
        found[name] = { kind, state, 0, 0 }
        list[#list + 1] = found[name]
      end
      found[name][3], found[name][4] = found[name][3] + 1, found[name][4] + seconds
    end
  end
  return list
end

-- overview(owner or "", host or worker or "", most) -> JSON: the whole cluster in one look that changes nothing, see
-- jobqueue/overview.py; `most` jobs in a list. What it costs grows with what runs and what is listed, not with what waits.
local function overview(_, args)
  local owner, host, most = args[1], args[2], tonumber(args[3])
  local now = time()
  local running, busy = running_ids(owner, host)
  local queued, queued_count, classes = queued_ids(redis.call('SMEMBERS', P .. 'queues'), owner, most)
  local delayed = delayed_ids(owner)
  local held, held_count = queued_ids({ 'held' }, owner, math.max(0, most - #queued - #delayed))
  local waiting, waiting_count = queued_ids({ 'waiting' }, owner, math.max(0, most - #queued - #delayed - #held))
  return cjson.encode({
    now = now, quiet = quiet_for(now), workers = map('workers'), busy = busy,
    drained = redis.call('SMEMBERS', P .. 'drained'), held_classes = redis.call('SMEMBERS', P .. 'held_classes'),
    live = map('live'), ended = ended_lately(owner, now),
    counts = { running = #running, queued = queued_count + #delayed, held = held_count, waiting = waiting_count },
    classes = classes,
    running = records(running, most), queued = records(queued, most), delayed = records(delayed, most - #queued),
    held = records(held, most), waiting = records(waiting, most),
  })
end

-- figures() -> JSON: what monitors want to know, in one look that changes nothing; see jobqueue/figures.py
local function figures()
  local _, busy = running_ids('', '')
  local _, _, classes = queued_ids(redis.call('SMEMBERS', P .. 'queues'), '', 0)
  local oldest, memory = {}, redis.call('INFO', 'memory')
  for queue in pairs(classes) do
    oldest[queue] = tonumber(redis.call('ZRANGE', P .. 'since:' .. queue, 0, 0, 'WITHSCORES')[2])
  end
  return cjson.encode({
    now = time(), workers = map('workers'), busy = busy, drained = redis.call('SMEMBERS', P .. 'drained'),
    live = map('live'), classes = classes, oldest = oldest, totals = map('totals'), waits = WAITS, durations = DURATIONS,
    memory = { tonumber(string.match(memory, 'used_memory:(%d+)')), tonumber(string.match(memory, 'maxmemory:(%d+)')) },
  })
end

-- to_tell(for how long, ms) -> {batch, T until which no other worker gets it, T of its end, told JSON}, or {}
local function to_tell(_, args)
  local now = time()
  local batch = redis.call('ZRANGE', P .. 'to_tell', '-inf', now, 'BYSCORE', 'LIMIT', 0, 1)[1]
  if not batch then return {} end
  redis.call('ZADD', P .. 'to_tell', now + args[1], batch)
  return { batch, tostring(now + args[1]), unpack(redis.call('HMGET', P .. 'batch:' .. batch, 'ended_at', 'told')) }
end

-- told(batch, T until which it is this worker's, T of its end, JSON, delay ms or -1: nothing is left to tell, results of attempts...)
--   -> 1, 0 where another worker has it by now, or it has begun again
local function told(_, args)
  local batch, till, ended_at, said, delay = unpack(args, 1, 5)
  for i = 6, #args do count(1, 'told', args[i]) end
  if redis.call('ZSCORE', P .. 'to_tell', batch) ~= till then return 0 end
  if redis.call('HGET', P .. 'batch:' .. batch, 'ended_at') ~= ended_at then return 0 end
  redis.call('HSET', P .. 'batch:' .. batch, 'told', said)
  if delay == '-1' then
    redis.call('ZREM', P .. 'to_tell', batch)
  else
    redis.call('ZADD', P .. 'to_tell', time() + delay, batch)
  end
  return 1
end

-- orderly(): the server is about to stop with everything on disk; the next process of it need not be distrusted
local function orderly() return redis.call('HDEL', LEASE_CLOCK, 'run_id', 'seen_at') end

local function register(name, callback, flags)
  redis.register_function { function_name = name .. '_VERSION', callback = callback, flags = flags }
end
local GROWS = {} -- refused, like any write, where Redis is at its memory limit
local SETTLES = { 'allow-oom' } -- must work even there: nothing that runs may be lost for want of memory
register('submit', in_time(submit), GROWS)
register('ask', in_time(ask), GROWS)
register('claim', claim, GROWS)
register('append', append, GROWS)
register('size', size, SETTLES)
register('refuse', refuse, SETTLES)
register('renew', renew, SETTLES)
register('settle', settle, SETTLES)
register('learn', learn, GROWS)
register('cancel', in_time(cancel), SETTLES)
register('release_base', in_time(release_base), SETTLES)
register('hold', in_time(hold), SETTLES)
register('release', in_time(release), SETTLES)
register('retry', in_time(retry), GROWS)
register('mark', in_time(mark), SETTLES)
register('remove', in_time(remove), SETTLES)
register('archive', archive, SETTLES)
register('sweep', sweep, SETTLES)
register('heartbeat', heartbeat, SETTLES)
register('leave', leave, SETTLES)
register('orderly', orderly, SETTLES)
register('to_tell', to_tell, SETTLES)
register('told', told, SETTLES)
register('overview', overview, { 'no-writes' })
register('figures', figures, { 'no-writes' })
