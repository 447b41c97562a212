"""What Redis does at once: scripts, whose keys each lie in one slot of a cluster.

The clock is the server's, so that those of the processes need not agree. Numbers are told as text,
since Redis cuts off what stands after their point.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Script:
    """A script in Lua."""

    text: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        # What Redis calls it by; it protects nothing.
        sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()
        object.__setattr__(self, "sha", sha)


_NOW = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
"""

TAKE = Script(
    _NOW
    + """
-- KEYS: a sorted set for each window, of what was taken by when. ARGV: hold, then count and seconds of each.
local answer, free = {}, true
for i, key in ipairs(KEYS) do
  local count, seconds = tonumber(ARGV[2 * i]), tonumber(ARGV[2 * i + 1])
  redis.call('ZREMRANGEBYSCORE', key, '-inf', string.format('%.17g', now - seconds))
  local left = count - redis.call('ZCARD', key)
  local oldest = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')
  local reset = oldest[2] and oldest[2] + seconds - now or seconds
  answer[#answer + 1] = tostring(left)
  answer[#answer + 1] = string.format('%.6f', reset)
  free = free and left > 0
end
if free then
  for i, key in ipairs(KEYS) do
    redis.call('ZADD', key, string.format('%.17g', now), ARGV[1])
    redis.call('EXPIRE', key, ARGV[2 * i + 1] + 1)
  end
end
return answer
"""
)

ACCOUNT = Script(
    _NOW
    + """
-- KEYS: a hash of numbers, and one of holds, each an amount and its end. ARGV: what to do, and with what.
local state, holds = KEYS[1], KEYS[2]
local held, running = 0, 0

local function keep()
  redis.call('EXPIRE', state, 172800)
  redis.call('EXPIRE', holds, 172800)
end

local function hold(name, amount, seconds)
  local value = string.format('%.17g %.17g', tonumber(amount), now + tonumber(seconds))
  redis.call('HSET', holds, name, value)
end

local function most(amount)
  local known = tonumber(redis.call('HGET', state, 'most') or '0')
  if tonumber(amount) > known then redis.call('HSET', state, 'most', amount) end
end

if ARGV[1] == 'learn' then
  redis.call('HSET', state, 'base', ARGV[2], 'mark', ARGV[3])
  most(ARGV[4])
  keep()
  return {}
elseif ARGV[1] == 'hold' then
  for i = 3, #ARGV, 2 do hold(ARGV[i], ARGV[i + 1], ARGV[2]) end
  keep()
  return {}
elseif ARGV[1] == 'settle' then
  redis.call('HDEL', holds, ARGV[2])
  if ARGV[3] then
    redis.call('HINCRBYFLOAT', state, 'settled', ARGV[3])
    redis.call('HINCRBY', state, 'guesses', ARGV[4])
    redis.call('HINCRBYFLOAT', state, 'guessed', ARGV[5])
    most(ARGV[6])
    keep()
  end
  return {}
end

local flat = redis.call('HGETALL', holds)
for i = 1, #flat, 2 do
  local amount, over = string.match(flat[i + 1], '(%S+) (%S+)')
  if tonumber(over) <= now then
    redis.call('HDEL', holds, flat[i])
  else
    held, running = held + amount, running + 1
  end
end
local said = redis.call('HMGET', state, 'base', 'mark', 'settled', 'most', 'guesses', 'guessed')
local settled, dearest = tonumber(said[3] or '0'), tonumber(said[4] or '0')
local spent = said[1] and said[1] + settled - said[2]
local granted, amount = 0, 0
if ARGV[1] == 'reserve' and spent then
  local budget = tonumber(ARGV[3])
  amount = math.max(tonumber(ARGV[4]), dearest)
  if spent < budget and (running == 0 or spent + held + amount <= budget) then
    hold(ARGV[2], amount, ARGV[5])
    keep()
    granted, held, running = 1, held + amount, running + 1
  end
end
local answer = {}
for i, number in ipairs({settled, held, running, dearest, said[5] or 0, said[6] or 0, granted, amount}) do
  answer[i] = string.format('%.17g', tonumber(number))
end
answer[#answer + 1] = spent and string.format('%.17g', spent) or ''
return answer
"""
)
